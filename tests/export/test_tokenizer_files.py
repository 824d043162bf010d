"""The exported tokenizer encodes as training's does: here by the tokenizers library."""

import base64
import importlib.util
import json
import random
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from tide_mega.data.index import DatasetIndex
from tide_mega.data.prepare.vocabulary import train_bpe
from tide_mega.data.tokenizer import BYTE_OF_CHARACTER, HFTokenizer, Llama3Tokenizer
from tide_mega.errors import ConfigError
from tide_mega.export.tokenizer_files import converted, without_additions, write_tokenizer

TEXTS = [
    "",
    "the quick brown fox's 12345 jumps\n\n  over  \t lazy dogs…",
    "naïve café 漢字かな 🙂👩‍👩‍👧 \x00\x7f \u200b",
    "def main(argv: list[str]) -> int:\n    return 0x1F + 1e-9  # ok?\n",
    "aaaaaaaaaaaaaaaaaaaa   aaaa",
    " " * 300 + "x" * 500 + "!?" * 100,
    "İstanbul straße ﬁ ℵ ﷺ\r\n\r\nI'LL we'Ve",
]


def varied(count: int) -> list[str]:
    """Return texts of characters of many ranges, and of repeated pieces."""
    rng = random.Random(0)
    ranges = [
        (32, 126),
        (97, 101),
        (9, 13),
        (0xA0, 0x24F),
        (0x400, 0x4FF),
        (0x4E00, 0x4F00),
        (0x1F600, 0x1F64F),
    ]
    return [
        "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randrange(1, 80)))
        for _ in range(count)
    ]


def llama3_model(path: Path) -> Path:
    """Write a small tokenizer.model: ranks as byte-level BPE gives them."""
    texts = [*TEXTS, *(source.read_text() for source in Path(__file__).parent.glob("*.py"))]
    vocabulary = json.loads(train_bpe(texts, 1200))["model"]["vocab"]
    spelled = sorted((rank, piece) for piece, rank in vocabulary.items() if piece != "<|endoftext|>")
    tokens = [b"".join(BYTE_OF_CHARACTER[c] for c in piece) for _, piece in spelled]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    path.write_text("".join(lines))
    return path


def assert_same(tokenizer: Llama3Tokenizer, texts: list[str]) -> None:
    loaded = tokenizers.Tokenizer.from_str(converted(tokenizer))
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert loaded.encode(text).ids == ids.tolist(), text
        assert loaded.decode(ids.tolist()) == text
    assert loaded.get_vocab_size() == tokenizer.vocab_size
    for index in sorted(tokenizer.special_ids):
        assert loaded.id_to_token(index) == tokenizer.token_text(index)


def test_a_tokenizer_model_becomes_a_tokenizer_json_with_the_same_ids(tmp_path):
    assert_same(Llama3Tokenizer(llama3_model(tmp_path / "tokenizer.model")), [*TEXTS, *varied(300)])


@pytest.mark.slow
def test_llama3s_own_file_becomes_a_tokenizer_json_with_the_same_ids():
    found = importlib.util.find_spec("llama_models")
    if found is None or found.origin is None:
        pytest.skip("the Llama-3 tokenizer.model is not installed")
    sources = [path.read_text() for path in Path(__file__).parents[2].rglob("*.py")][::7]
    tokenizer = Llama3Tokenizer(Path(found.origin).parent / "llama3" / "tokenizer.model")
    assert_same(tokenizer, [*TEXTS, *varied(2000), *sources])


def test_nothing_is_added_cut_or_padded(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2, "</s>": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["</s>"])
    inner.post_processor = processors.TemplateProcessing(single="</s> $A </s>", special_tokens=[("</s>", 3)])
    inner.enable_truncation(4)
    inner.enable_padding(length=9)
    path = tmp_path / "tokenizer.json"
    inner.save(str(path))
    loaded = tokenizers.Tokenizer.from_str(without_additions(path.read_text()))
    text = "a b a b a b a"
    assert (
        loaded.encode(text).ids == HFTokenizer(path).encode_batch([text])[0].tolist() == [0, 1, 0, 1, 0, 1, 0]
    )


def test_the_end_of_document_token_begins_ends_and_pads(tiny_data, tmp_path):
    eos_id = write_tokenizer(tiny_data, tmp_path, 32)
    assert eos_id == DatasetIndex.load(tiny_data).tokenizer.eos_id
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert {config[f"{role}_token"] for role in ("bos", "eos", "pad")} == {"<|endoftext|>"}
    assert config["model_max_length"] == 32


def test_another_tokenizer_in_the_datasets_place_is_refused(tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data", ignore=shutil.ignore_patterns("*.tar"))
    (data / "tokenizer.json").write_text(train_bpe(TEXTS * 5, 600))
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not the tokenizer that made the tokens of"):
        write_tokenizer(data, tmp_path, 32)
