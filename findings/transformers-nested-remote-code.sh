#!/bin/bash
# transformers 5.5.4 and 5.24.0, torch 2.13.0 (CPU).
#
# Behaviour: a folder's own code may be several files that import each other. Of a local folder, 5.5.4 copies only the
# files that the one named in auto_map imports, not those that these import in turn, and then fails as it follows them.
# 5.24.0 loads the same folder.
#
# Output seen:
#   transformers 5.5.4: FileNotFoundError
#   transformers 5.24.0: OwnForCausalLM 2
#
# Why it matters here: an exported folder's code is five files. Every one of them is imported by modeling_tide.py itself,
# whether it uses it or not, so that all versions of transformers 5 load the folder.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir "$work/model"
cat >"$work/model/modeling_own.py" <<'PYTHON'
from transformers import LlamaConfig, LlamaForCausalLM

from .second_own import NUMBER


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    number = NUMBER
PYTHON
echo "from .third_own import NUMBER  # noqa: F401" >"$work/model/second_own.py"
echo "NUMBER = 2" >"$work/model/third_own.py"
cat >"$work/load.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

folder = Path(sys.argv[1])
shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
config = json.loads((folder / "config.json").read_text())
config |= {
    "model_type": "own",
    "architectures": ["OwnForCausalLM"],
    "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
}
(folder / "config.json").write_text(json.dumps(config))
try:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    print(f"transformers {transformers.__version__}: {type(model).__name__} {model.number}")
except FileNotFoundError:
    print(f"transformers {transformers.__version__}: FileNotFoundError")
PYTHON
python3 -m venv "$work/venv"
for version in 5.5.4 5.24.0; do
    "$work/venv/bin/pip" install -q "torch==2.13.0" "transformers==$version" "numpy==2.4.6" >/dev/null
    HF_HUB_OFFLINE=1 HF_HOME="$work/home-$version" "$work/venv/bin/python" "$work/load.py" "$work/model" 2>>"$work/errors" || cat "$work/errors"
done | tee "$work/seen"
diff - "$work/seen" <<'SEEN'
transformers 5.5.4: FileNotFoundError
transformers 5.24.0: OwnForCausalLM 2
SEEN
