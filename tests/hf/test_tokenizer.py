"""The exported tokenizer, loaded by transformers, encodes as training's does."""

import json
import random
import shutil

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.export.test_tokenizer_files import TEXTS, llama3_model, varied
from tide_mega.data.tokenizer import load_tokenizer
from tide_mega.export.tokenizer_files import write_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")


def loaded(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("name", ["tied", "plain"])
def test_ids_are_those_of_training(name, exported, runs):
    tokenizer, ours = loaded(exported(name)), runs[name].run.tokenizer
    texts = [*TEXTS, *varied(200)]
    assert tokenizer(texts)["input_ids"] == [ids.tolist() for ids in ours.encode_batch(texts)]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    roles = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert set(roles) == {ours.eos_id}
    assert tokenizer.model_max_length == 32


def test_ids_of_a_tokenizer_model_too(tiny_data, tmp_path):
    data = shutil.copytree(
        tiny_data, tmp_path / "data", ignore=shutil.ignore_patterns("*.tar", "tokenizer.json")
    )
    ours = load_tokenizer(llama3_model(data / "tokenizer.model"))
    index = json.loads((data / "index.json").read_text())
    index["tokenizer"] |= {"file": "tokenizer.model", "fingerprint": ours.fingerprint, "eos_id": ours.eos_id}
    (data / "index.json").write_text(json.dumps(index))
    assert write_tokenizer(data, tmp_path, 4096) == ours.eos_id
    tokenizer = loaded(tmp_path)
    texts = [*TEXTS, *varied(200)]
    assert tokenizer(texts)["input_ids"] == [ids.tolist() for ids in ours.encode_batch(texts)]
    assert tokenizer.eos_token == "<|end_of_text|>" and tokenizer.eos_token_id == ours.eos_id


def test_batches_are_padded_and_the_model_reads_them(exported):
    tokenizer = loaded(exported("tied"))
    tokenizer.padding_side = "left"
    batch = tokenizer(["def", "def main(arguments):"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, 0] == tokenizer.pad_token_id and batch["attention_mask"][0, 0] == 0


def test_saved_again_it_is_still_the_models(exported, tmp_path):
    from tests.support.exports import load

    tokenizer = loaded(exported("tied"))
    tokenizer.add_tokens(["<new>"])
    load(exported("tied")).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    load(tmp_path)
    rng = random.Random(0)
    text = "".join(chr(rng.randint(32, 126)) for _ in range(200))
    assert loaded(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
