import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import zstandard

from tests.data.test_documents import read, texts, the_bad, write
from tide_mega.data.prepare.compressed import COMPRESSIONS
from tide_mega.data.prepare.documents import BadRecord, Document

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    "xz": partial(lzma.compress, preset=0),
    "bz2": bz2.compress,
}
NAMES = {"gz": "gzip", "zst": "zstd", "xz": "xz", "bz2": "bzip2"}
MARK = b"\xef\xbb\xbf"
every = pytest.mark.parametrize("kind", COMPRESS)


def lines(count: int) -> bytes:
    """JSON lines that do not compress well, so that their beginning is had before the end is read."""
    rng = random.Random(0)
    return b"".join(json.dumps({"text": rng.randbytes(150).hex()}).encode() + b"\n" for _ in range(count))


def test_every_compression_is_tested() -> None:
    assert set(COMPRESS) == set(COMPRESSIONS)


@every
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_lines_are_those_of_the_plain_file_with_several_streams_too(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    content, compress = lines(50), COMPRESS[kind]
    plain = read(write(tmp_path / f"a{suffix}", content))
    assert len(texts(plain)) == 50
    whole = write(tmp_path / f"b{suffix}.{kind}", compress(content))
    streams = compress(MARK + content[:2001]) + compress(b"") + compress(content[2001:])
    assert read(whole) == read(write(tmp_path / f"c{suffix}.{kind}", streams)) == plain


@every
def test_a_text_is_one_document_without_its_mark(tmp_path: Path, kind: str) -> None:
    assert texts(read(write(tmp_path / f"a.txt.{kind}", COMPRESS[kind](MARK + "é\r\n".encode())))) == [
        "é\r\n"
    ]


@every
def test_a_cut_off_file_is_named_and_its_whole_lines_are_kept(tmp_path: Path, kind: str) -> None:
    content = lines(8000)
    compressed = COMPRESS[kind](content)
    *kept, last = read(write(tmp_path / f"a.jsonl.{kind}", compressed[:-50]))
    reason = f"its {NAMES[kind]} stream is cut off after {len(kept)} whole lines; what follows them is lost"
    assert (last.source, last.reason) == (f"a.jsonl.{kind}", reason)  # type: ignore[union-attr]
    assert len(kept) > 3000
    assert kept == texts_of(content)[: len(kept)]
    for few in (1, 3, 12):
        assert (
            "cut off after 0 whole lines"
            in the_bad(read(write(tmp_path / f"b.json.{kind}", compressed[:few]))).reason
        )


@every
def test_an_altered_file_is_named_and_what_stands_before_is_kept(tmp_path: Path, kind: str) -> None:
    content = lines(8000)
    compressed = bytearray(COMPRESS[kind](content))
    at = len(compressed) * 9 // 10
    compressed[at : at + 40] = bytes(40)
    *kept, last = read(write(tmp_path / f"a.jsonl.{kind}", bytes(compressed)))
    assert isinstance(last, BadRecord)
    assert f"its {NAMES[kind]} stream is damaged" in last.reason
    assert f"after {len(kept)} whole lines" in last.reason
    assert len(kept) > 3000
    assert kept[:3000] == texts_of(content)[:3000]


@every
def test_bytes_behind_a_stream_that_are_none_are_damage(tmp_path: Path, kind: str) -> None:
    content = COMPRESS[kind](lines(3)) + b"something else"
    records = read(write(tmp_path / f"a.jsonl.{kind}", content))
    assert len(records) == 4
    assert "after 3 whole lines" in the_bad(records).reason


@pytest.mark.parametrize("kind", ["gz", "xz"])
def test_zeros_may_pad_a_stream(tmp_path: Path, kind: str) -> None:
    stream = COMPRESS[kind](lines(2))
    padded = write(tmp_path / f"a.jsonl.{kind}", stream + bytes(70_000) + stream + bytes(4))
    assert len(texts(read(padded))) == 4
    assert "is damaged" in the_bad(read(write(tmp_path / f"b.jsonl.{kind}", bytes(100)))).reason


@every
def test_a_text_that_is_not_whole_is_none(tmp_path: Path, kind: str) -> None:
    bad = the_bad(read(write(tmp_path / f"a.txt.{kind}", COMPRESS[kind](lines(20))[:-3])))
    assert bad.source == f"a.txt.{kind}"
    assert "is cut off, so its text is not whole" in bad.reason


@every
def test_a_plain_file_by_a_compressed_name_is_damaged(tmp_path: Path, kind: str) -> None:
    assert "stream is damaged" in the_bad(read(write(tmp_path / f"a.ndjson.{kind}", lines(1)))).reason


def texts_of(content: bytes) -> list[Document]:
    return [Document(json.loads(line)["text"]) for line in content.splitlines()]
