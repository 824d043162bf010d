import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from tide_mega.data.prepare.vocabulary import train_bpe
from tide_mega.data.tokenizer import HFTokenizer, Llama3Tokenizer, load_tokenizer
from tide_mega.errors import ConfigError

TEXTS = [
    "the quick brown fox",
    "",
    "naïve café 漢字 🙂 \x00\x7f",
    "<|endoftext|> is text here",
    "  \n\t\n x=1 ",
]


def test_trained_bpe_gives_back_every_text(tokenizer: HFTokenizer) -> None:
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert tokenizer.decode(ids.tolist()) == text
        assert b"".join(tokenizer.token_bytes(v) for v in ids.tolist()) == text.encode()
        assert not tokenizer.special_ids & set(ids.tolist())
        assert ids.dtype == np.int64


def test_trained_bpe_has_its_size_and_eos(tokenizer: HFTokenizer) -> None:
    assert tokenizer.vocab_size == 512
    assert tokenizer.eos_id == 0
    assert tokenizer.special_ids == {0}
    assert tokenizer.token_text(0) == "<|endoftext|>"
    assert sorted(tokenizer.token_bytes(v) for v in range(1, 257)) == [bytes([b]) for b in range(256)]


def test_training_twice_gives_the_same_file() -> None:
    texts = [f"{word} {word[::-1]} {i % 17}" for i, word in enumerate(["alpha", "beta", "gamma"] * 50)]
    assert train_bpe(texts, 512) == train_bpe(iter(texts), 512)


def test_text_too_small_for_the_vocabulary_gives_fewer_tokens() -> None:
    assert len(json.loads(train_bpe(["ab ab"], 600))["model"]["vocab"]) < 300


def word_level(path: Path, special: list[str]) -> Path:
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(special)
    inner.enable_truncation(2)
    inner.enable_padding(length=8)
    inner.save(str(path))
    return path


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path: Path) -> None:
    loaded = load_tokenizer(word_level(tmp_path / "tokenizer.json", ["</s>"]))
    assert [ids.tolist() for ids in loaded.encode_batch(["a b a b a", "b"])] == [[0, 1, 0, 1, 0], [1]]


@pytest.mark.parametrize(
    ("special", "expected"),
    [(["<eos>", "</s>"], "</s>"), (["<|end_of_text|>", "<eos>"], "<|end_of_text|>"), (["<eos>"], "<eos>")],
)
def test_eos_is_found_among_common_names(tmp_path: Path, special: list[str], expected: str) -> None:
    loaded = load_tokenizer(word_level(tmp_path / "tokenizer.json", special))
    assert loaded.token_text(loaded.eos_id) == expected


def test_eos_token_chooses_and_changes_the_fingerprint(tmp_path: Path) -> None:
    path = word_level(tmp_path / "tokenizer.json", ["</s>", "<stop>"])
    chosen = load_tokenizer(path, "<stop>")
    assert chosen.token_text(chosen.eos_id) == "<stop>"
    assert chosen.fingerprint != load_tokenizer(path).fingerprint


def test_without_a_known_eos_the_error_names_the_option(tmp_path: Path) -> None:
    path = word_level(tmp_path / "tokenizer.json", ["<stop>"])
    with pytest.raises(ConfigError, match="eos_token"):
        load_tokenizer(path)
    with pytest.raises(ConfigError, match=r"<none> is not in the vocabulary"):
        load_tokenizer(path, "<none>")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "not a readable tokenizer.json"),
        ("tokenizer.json", "{", "not a readable tokenizer.json"),
        ("tokenizer.model", "not base64!", "line 1 is not a base64 token"),
        ("tokenizer.model", "YQ== 0\nYg== 2\n", "without a gap"),
        ("tokenizer.model", "", "without a gap"),
        ("vocab.bin", "", "neither a .json"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as raised:
        load_tokenizer(tmp_path / name)
    assert name in str(raised.value)


def test_a_byte_order_mark_is_no_part_of_a_tokenizer(tmp_path: Path) -> None:
    plain = word_level(tmp_path / "tokenizer.json", ["<eos>"])
    marked = tmp_path / "marked.json"
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    text = ["a b a"]
    assert [load_tokenizer(path).encode_batch(text)[0].tolist() for path in (plain, marked)] == [
        [0, 1, 0]
    ] * 2
    ranks = tmp_path / "tokenizer.model"
    ranks.write_bytes(b"\xef\xbb\xbfYQ== 0\nYg== 1\n")
    assert load_tokenizer(ranks).token_bytes(0) == b"a"


def test_a_missing_file_is_named_and_a_folder_is_searched(tmp_path: Path, tokenizer_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json does not exist"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tokenizer_path.parent).vocab_size == 512


@pytest.fixture(scope="module")
def llama3() -> Llama3Tokenizer:
    found = importlib.util.find_spec("llama_models")
    if found is None or found.origin is None:
        pytest.skip("the Llama-3 tokenizer.model is not installed")
    return Llama3Tokenizer(Path(found.origin).parent / "llama3" / "tokenizer.model")


def test_llama3_has_the_published_ids(llama3: Llama3Tokenizer) -> None:
    assert llama3.vocab_size == 128_256
    assert llama3.eos_id == 128_001
    assert len(llama3.special_ids) == 256
    assert llama3.encode_batch(["Hello world!"])[0].tolist() == [9906, 1917, 0]
    assert llama3.decode([9906, 1917, 0, 128_001]) == "Hello world!<|end_of_text|>"
    assert llama3.token_text(128_255) == "<|reserved_special_token_246|>"


def test_llama3_gives_back_every_text(llama3: Llama3Tokenizer) -> None:
    texts = [*TEXTS, "<|end_of_text|>", "x" * 60_000, " " * 30_000 + "y"]
    for text, ids in zip(texts, llama3.encode_batch(texts), strict=True):
        assert b"".join(llama3.token_bytes(v) for v in ids.tolist()) == text.encode()
        assert not llama3.special_ids & set(ids.tolist())


def test_a_small_tokenizer_model_of_the_same_format(tmp_path: Path) -> None:
    import base64

    tokens = [bytes([b]) for b in range(256)] + [b"he", b"hell", b"ll"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    path = tmp_path / "tokenizer.model"
    path.write_text("\n".join(lines))
    small = load_tokenizer(path)
    assert small.vocab_size == 259 + 256
    assert small.encode_batch(["hell", "he", ""])[0].tolist() == [257]
    before = small.fingerprint
    path.write_text("\n".join(lines[:-1]))
    assert load_tokenizer(path).fingerprint != before
    assert load_tokenizer(path).vocab_size == 258 + 256
