#!/bin/bash
# transformers 5.24.0 with its `serving` extra, torch 2.13.0 (CPU).
#
# Behaviour: `transformers serve` has --trust-remote-code and passes it on to the configuration and the tokenizer, but
# looks the model's class up by its architecture's name among transformers' own. A folder whose class is in its own code,
# which AutoModelForCausalLM loads, cannot be served: AttributeError.
#
# Output seen:
#   AutoModelForCausalLM: OwnForCausalLM
#   serve: AttributeError: module transformers has no attribute OwnForCausalLM
#
# Why it matters here: an exported folder with memory blocks brings its own code. `transformers serve` serves only exports
# with K = 0, which are stock Llama; docs/serving.md sends users to vLLM's transformers backend for the others.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.13.0" "transformers[serving]==5.24.0" "numpy==2.4.6" >/dev/null
mkdir "$work/model"
cat >"$work/model/modeling_own.py" <<'PYTHON'
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
PYTHON
cat >"$work/serve.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import tokenizers
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.cli.serving.model_manager import ModelManager

folder = Path(sys.argv[1])
shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=0, eos_token_id=0, pad_token_id=0)).save_pretrained(folder)
config = json.loads((folder / "config.json").read_text())
config |= {
    "model_type": "own",
    "architectures": ["OwnForCausalLM"],
    "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
}
(folder / "config.json").write_text(json.dumps(config))
words = {"<eos>": 0, **{f"w{n}": n for n in range(1, 64)}}
tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>")).save(str(folder / "tokenizer.json"))
described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
(folder / "tokenizer_config.json").write_text(json.dumps(described))

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
print("AutoModelForCausalLM:", type(model).__name__)
try:
    ModelManager(device="cpu", dtype="float32", trust_remote_code=True).load_model_and_processor(str(folder) + "@main")
    print("serve: loaded")
except AttributeError as error:
    print(f"serve: AttributeError: {error}")
PYTHON
seen="$(cd "$work" && HF_HUB_OFFLINE=1 HF_HOME="$work/home" "$work/venv/bin/python" serve.py "$work/model" 2>"$work/errors")" || { cat "$work/errors"; exit 1; }
echo "$seen"
grep -q "^AutoModelForCausalLM: OwnForCausalLM$" <<<"$seen"
grep -q "^serve: AttributeError: module transformers has no attribute OwnForCausalLM$" <<<"$seen"
