import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.conftest import make_text
from tide_mega.data.loader import IGNORE_LABEL, TokenBatch
from tide_mega.data.texts import TextSet, text_name
from tide_mega.data.tokenizer import HFTokenizer
from tide_mega.errors import ConfigError, DataError


def of_ids(ids: np.ndarray) -> TextSet:
    return TextSet("made", ids, num_bytes=1, eos_id=0)


def pairs(batches: list[TokenBatch]) -> list[tuple[list[int], int]]:
    """Each label with the tokens before it in its row."""
    found = []
    for tokens_BT, labels_BT in batches:
        for tokens, labels in zip(tokens_BT.tolist(), labels_BT.tolist(), strict=True):
            for t, label in enumerate(labels):
                if label != IGNORE_LABEL:
                    found.append((tokens[: t + 1], label))
    return found


def test_windows_share_a_token_and_the_last_is_padded() -> None:
    (batch,) = of_ids(np.arange(10, 18)).batches(3, 4)
    assert batch.tokens_BT.tolist() == [[10, 11, 12], [13, 14, 15], [16, 0, 0], [0, 0, 0]]
    assert batch.labels_BT.tolist() == [[11, 12, 13], [14, 15, 16], [17, -1, -1], [-1, -1, -1]]


@given(
    count=st.integers(2, 60),
    seq_length=st.integers(1, 9),
    micro=st.integers(1, 4),
    dp_size=st.integers(1, 4),
)
def test_over_all_ranks_each_token_but_the_first_is_predicted_once_from_its_window(
    count: int, seq_length: int, micro: int, dp_size: int
) -> None:
    ids = np.arange(100, 100 + count)
    ranks = [
        list(of_ids(ids).batches(seq_length, micro, dp_rank=rank, dp_size=dp_size)) for rank in range(dp_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(x.shape == (micro, seq_length) for batches in ranks for batch in batches for x in batch)
    predicted = [pair for batches in ranks for pair in pairs(batches)]
    assert sorted(label for _, label in predicted) == ids[1:].tolist()
    for context, label in predicted:
        window = (label - 101) // seq_length
        assert context == list(range(100 + window * seq_length, label))


def test_a_text_is_encoded_as_a_whole_and_its_bytes_are_those_after_the_first_token(
    tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    text = make_text(np.random.default_rng(3), 80) + "naïve 北京 🙂\n\n= head =\n"
    path = tmp_path / "some.valid.txt"
    path.write_bytes(text.encode())
    found = TextSet.load(path, tokenizer)
    expected = tokenizer.encode_batch([text])[0]
    assert found.name == "some.valid"
    assert found.ids_N.tolist() == expected.tolist()
    assert found.num_scored == len(expected) - 1
    assert found.num_bytes == len(text.encode()) - len(tokenizer.token_bytes(int(expected[0])))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(limit=st.integers(2, 500))
def test_the_beginning_of_a_text_is_that_of_the_whole_text(
    tmp_path: Path, tokenizer: HFTokenizer, limit: int
) -> None:
    text = " " * 3000 + make_text(np.random.default_rng(4), 900)
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    whole = TextSet.load(path, tokenizer)
    begun = TextSet.load(path, tokenizer, max_tokens=limit)
    assert begun.ids_N.tolist() == whole.ids_N[:limit].tolist()
    assert begun.num_bytes == sum(len(tokenizer.token_bytes(i)) for i in begun.ids_N[1:].tolist())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/b.valid.txt", "b.valid"),
        ("b.JSONL", "b"),
        ("b.jsonl.zst", "b"),
        ("a/.jsonl", ".jsonl"),
        (".txt", ".txt"),
    ],
)
def test_a_text_is_called_as_its_file_and_never_nothing(path: str, name: str) -> None:
    assert text_name(path) == name


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_documents_of_json_lines_have_eos_between_them(
    tmp_path: Path, tokenizer: HFTokenizer, suffix: str
) -> None:
    texts = ["the quick brown fox", "", "naïve engineers", "memory tables grow"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path = tmp_path / f"set{suffix}"
    path.write_bytes(zstandard.compress(lines) if suffix.endswith("zst") else lines)
    first, _, second, third = tokenizer.encode_batch(texts)
    eos = [tokenizer.eos_id]
    expected = [*first, *eos, *second, *eos, *third]
    found = TextSet.load(path, tokenizer)
    assert found.name == "set"
    assert found.ids_N.tolist() == expected
    assert found.num_bytes == len("".join(texts).encode()) - len(tokenizer.token_bytes(int(first[0])))
    for limit in range(2, len(expected) + 3):
        assert TextSet.load(path, tokenizer, max_tokens=limit).ids_N.tolist() == expected[:limit]


class HalfSpelled(HFTokenizer):
    """Its tokens spell half of their bytes."""

    def token_bytes(self, token_id: int) -> bytes:
        return super().token_bytes(token_id)[::2]


def test_bytes_that_no_token_spells_are_shared_out(
    tmp_path: Path, tokenizer: HFTokenizer, tokenizer_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(make_text(np.random.default_rng(6), 2000), encoding="utf-8")
    exact = TextSet.load(path, tokenizer, max_tokens=1000).num_bytes
    assert TextSet.load(path, HalfSpelled(tokenizer_path), max_tokens=1000).num_bytes == pytest.approx(
        exact, rel=0.02
    )


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("absent.txt", None, ConfigError, r"the text .*absent\.txt is not a file: give one"),
        ("empty.txt", b"", DataError, r"empty\.txt comes to 0 tokens, and one prediction needs two"),
        (
            "latin.txt",
            "na\u00efve".encode("latin-1"),
            DataError,
            r"latin\.txt is not UTF-8: byte 0xef at offset 2",
        ),
        ("binary.txt", b"a\0b", DataError, r"binary\.txt has a NUL byte at offset 1"),
        ("bad.jsonl", b'{"text": "a b c"}\n{"body": 1}\n', DataError, r"bad\.jsonl:2 has no key 'text'"),
        ("bad.jsonl", b"[1\n", DataError, r"bad\.jsonl:1 is not JSON"),
    ],
)
def test_what_cannot_be_used_is_said(
    tmp_path: Path,
    tokenizer: HFTokenizer,
    name: str,
    content: bytes | None,
    error: type[Exception],
    message: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        TextSet.load(tmp_path / name, tokenizer)


def test_ids_beyond_the_models_vocabulary_are_refused(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    path = tmp_path / "text.txt"
    path.write_text(make_text(np.random.default_rng(7), 60), encoding="utf-8")
    largest = int(TextSet.load(path, tokenizer).ids_N.max())
    TextSet.load(path, tokenizer, vocab_size=largest + 1)
    with pytest.raises(
        DataError, match=rf"has token id {largest}, and the model's vocabulary has {largest}:"
    ):
        TextSet.load(path, tokenizer, vocab_size=largest)


SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "ppl"


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the sample texts are not here")
def test_real_texts_keep_their_bytes(tokenizer: HFTokenizer) -> None:
    path = SAMPLES / "pubmed-abstracts.txt"
    found = TextSet.load(path, tokenizer)
    first = len(tokenizer.token_bytes(int(found.ids_N[0])))
    assert found.num_bytes == path.stat().st_size - first


@pytest.mark.parametrize(
    ("name", "called"),
    [("a.b.txt.gz", "a.b"), ("a.ndjson", "a"), ("a.json.XZ", "a"), ("a.parquet", "a"), ("a.tokens", "a")],
)
def test_names_lose_the_suffix_of_their_compression_too(name: str, called: str) -> None:
    assert text_name(name) == called


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.raw", "a.ndjson", "a.json.gz"])
def test_a_text_is_read_without_its_mark_from_every_kind_of_file(
    tmp_path: Path, tokenizer: HFTokenizer, name: str
) -> None:
    text = "the quick brown fox"
    content = "\ufeff" + (json.dumps({"text": text}) if "json" in name else text)
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if "gz" in name else content.encode())
    found = TextSet.load(tmp_path / name, tokenizer)
    assert found.ids_N.tolist() == tokenizer.encode_batch([text])[0].tolist()


def test_a_text_of_one_json_array_is_refused_with_what_to_do(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    (tmp_path / "a.json").write_text('[{"text": "x"}]')
    with pytest.raises(DataError, match=r"a\.json is one JSON array, not JSON lines: write an object a line"):
        TextSet.load(tmp_path / "a.json", tokenizer)
