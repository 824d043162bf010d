"""A document beyond `max_document_bytes` is a bad record, of which no more than that is ever in memory."""

import bz2
import gzip
import json
import lzma
import re
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.test_compressed import COMPRESS
from tests.data.test_documents import the_bad, write
from tide_mega.config.schema import DataConfig
from tide_mega.data.index import DatasetIndex
from tide_mega.data.prepare import parquet
from tide_mega.data.prepare.compressed import MAX_DOCUMENT_BYTES
from tide_mega.data.prepare.documents import BadRecord, Document, read_piece
from tide_mega.data.prepare.inputs import find_inputs, plan_units
from tide_mega.data.prepare.options import PrepareOptions
from tide_mega.data.texts import TextSet
from tide_mega.data.tokenizer import HFTokenizer
from tide_mega.errors import ConfigError, DataError
from tide_mega.lab.zero_shot import harness as local
from tide_mega.memory import distinct

Run = Callable[[PrepareOptions], DatasetIndex]
LIMIT, MIB = 1000, 2**20
every = pytest.mark.parametrize("kind", ["", *COMPRESS])


def read(path: Path, longest: int = LIMIT, unit_bytes: int = 2**30) -> list[Document | BadRecord]:
    units = plan_units(find_inputs([str(path)], []).files, unit_bytes)
    return [
        record
        for unit in units
        for piece in unit.pieces
        for record in read_piece(piece, "text", lambda count: None, longest)
    ]


def file_of(folder: Path, name: str, kind: str, content: bytes) -> Path:
    return write(folder / f"{name}.{kind}".rstrip("."), COMPRESS[kind](content) if kind else content)


def line_of(size: int) -> bytes:
    return b'{"text": "%s"}' % (b"x" * (size - 12))


@every
@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_longer_line_is_bad_by_its_number_and_its_neighbours_are_read(
    tmp_path: Path, kind: str, end: bytes
) -> None:
    for longer in (LIMIT + 1, 40 * LIMIT):
        lines = [line_of(20), line_of(longer), line_of(LIMIT), line_of(longer)]
        records = read(file_of(tmp_path, "a.jsonl", kind, b"\n".join(lines) + end))
        name = f"a.jsonl.{kind}".rstrip(".")
        assert [len(record.text) for record in records if isinstance(record, Document)] == [8, LIMIT - 12]
        assert [record.source for record in records if isinstance(record, BadRecord)] == [
            f"{name}:2",
            f"{name}:4",
        ]
        assert "is longer than max_document_bytes=1000: " in records[1].reason  # type: ignore[union-attr]


def test_a_longer_line_is_one_bad_record_however_its_file_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"\n".join([line_of(20), line_of(5 * LIMIT), line_of(30)]))
    whole = read(path)
    assert len(whole) == 3
    for unit_bytes in (1, 20, 21, 22, 999, LIMIT):
        assert read(path, unit_bytes=unit_bytes) == whole


@every
def test_a_longer_text_is_bad(tmp_path: Path, kind: str) -> None:
    assert read(file_of(tmp_path, "a.txt", kind, b"x" * LIMIT)) == [Document("x" * LIMIT)]
    bad = the_bad(read(file_of(tmp_path, "b.txt", kind, b"x" * (LIMIT + 1))))
    assert bad.source == f"b.txt.{kind}".rstrip(".")
    assert bad.reason.startswith("is longer than max_document_bytes=1000: ")


def test_a_longer_value_of_parquet_is_bad_counted_in_bytes(tmp_path: Path) -> None:
    values = ["x" * LIMIT, "é" * 501, "é" * 500]
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    records = read(tmp_path / "a.parquet")
    assert [isinstance(record, Document) for record in records] == [True, False, True]
    assert the_bad(records).source == "a.parquet, row 1"


def test_a_value_that_a_few_bytes_of_parquet_repeat_is_in_memory_a_few_times(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * (MIB // 8)] * 2000}), path, compression="zstd")
    assert path.stat().st_size < 1000
    before, most, count = pyarrow.total_allocated_bytes(), 0, 0
    units = plan_units(find_inputs([str(path)], []).files, 2**30)
    for record in read_piece(units[0].pieces[0], "text", lambda size: None, MIB // 4):
        most = max(most, pyarrow.total_allocated_bytes())
        count += isinstance(record, Document)
    assert count == 2000 and most - before < 2 * MIB


def test_rows_of_parquet_that_are_long_on_average_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    values = [f"{i:02}" + "x" * 498 for i in range(20)]
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path, use_dictionary=False)
    with path.open("rb") as file:
        group = pyarrow.parquet.ParquetFile(file).metadata.row_group(0)
        assert parquet._dictionary_size(file, group.column(0)) == 0
        assert [parquet._rows_at_a_time(file, group, "text", most) for most in (10, 1200, 2**20)] == [
            1,
            2,
            1024,
        ]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["é" * 300, "b"] * 10}), path)
    with path.open("rb") as file:
        group = pyarrow.parquet.ParquetFile(file).metadata.row_group(0)
        assert parquet._dictionary_size(file, group.column(0)) == 4 + 600 + 4 + 1
        assert parquet._rows_at_a_time(file, group, "text", 1300) == 2


def test_a_row_group_beyond_all_measure_is_bad_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [f"{i:02}" + "x" * 498 for i in range(20)]
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet", use_dictionary=False)
    assert len(read(tmp_path / "a.parquet")) == 20
    monkeypatch.setattr(parquet, "_LARGEST_GROUP", 5000)
    assert re.fullmatch(
        r"has a row group of 1\d,\d\d\d bytes of 'text', uncompressed, and at most 5,000 are read at a time: "
        "write it with smaller row groups",
        the_bad(read(tmp_path / "a.parquet")).reason,
    )


def zstd_frame(blocks: list[tuple[int, bytes]], window_log: int = 17) -> bytes:
    """A frame of run-length blocks: (times, byte)."""
    frame = struct.pack("<IBB", 0xFD2FB528, 0, (window_log - 10) << 3)
    for i, (times, byte) in enumerate(blocks):
        frame += struct.pack("<I", times << 3 | 1 << 1 | (i == len(blocks) - 1))[:3] + byte
    return frame


@cache
def bomb(kind: str) -> bytes:
    """One line of 64 MiB without an end, in a stream of a few kB (plain: as it is), between two good lines."""
    good = b'{"text": "good"}\n'
    if kind == "zst":
        middle = zstd_frame([(2**17, b"x")] * 512)
    else:
        makers: dict[str, Callable[[bytes], bytes]] = {
            "gz": gzip.compress,
            "bz2": bz2.compress,
            "xz": lambda raw: lzma.compress(raw, preset=0),
        }
        middle = makers[kind](b"x" * 64 * MIB) if kind else b"x" * 64 * MIB
    compress = COMPRESS[kind] if kind else bytes
    return compress(good) + middle + compress(b"\n" + good)


@every
@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_memory_is_bounded_by_the_limit_and_not_by_what_a_stream_grows_to(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    path = write(tmp_path / f"a{suffix}.{kind}".rstrip("."), bomb(kind))
    assert not kind or path.stat().st_size < 100_000
    tracemalloc.start()
    try:
        records = read(path, longest=MIB)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "max_document_bytes=1048576" in the_bad(records).reason
    assert len(records) == (3 if suffix == ".jsonl" else 1)
    assert peak < 36 * MIB


def xz_with_window(content: bytes, code: int) -> bytes:
    """An xz stream whose header asks for a dictionary of the size with this code."""
    stream = bytearray(lzma.compress(content, preset=0))
    end = 12 + (stream[12] + 1) * 4
    at = stream.index(b"\x21\x01", 12, end) + 2
    stream[at] = code
    stream[end - 4 : end] = struct.pack("<I", zlib.crc32(stream[12 : end - 4]))
    return bytes(stream)


@pytest.mark.parametrize("kind", ["zst", "xz"])
def test_a_window_beyond_128_mib_needs_the_limit_to_be_raised(tmp_path: Path, kind: str) -> None:
    content = b"x" * 9
    made = {
        "zst": lambda log: zstd_frame([(9, b"x")], log),
        "xz": lambda log: xz_with_window(content, 2 * (log - 12)),
    }[kind]
    assert read(write(tmp_path / f"a.txt.{kind}", made(27))) == [Document("x" * 9)]
    large = write(tmp_path / f"b.txt.{kind}", made(28))
    assert "asks for more than 134217728 bytes of memory as its window (raise max_document_bytes" in (
        the_bad(read(large)).reason
    )
    assert read(large, longest=2**28) == [Document("x" * 9)]


def test_preparation_names_the_option_and_can_leave_the_document_out(
    options: PrepareOptions, documents: list[str], run: Run, tmp_path: Path
) -> None:
    (tmp_path / "in" / "long.jsonl.zst").write_bytes(COMPRESS["zst"](line_of(20) + b"\n" + line_of(5000)))
    limited = replace(options, max_document_bytes=4000)
    with pytest.raises(
        DataError, match=r"in/long.jsonl.zst:2 is longer than max_document_bytes=4000: cut .* raise that"
    ):
        run(limited)
    index = run(replace(limited, on_bad_file="skip"))
    assert (index.totals.bad, index.totals.documents) == (1, 41)
    with pytest.raises(ConfigError, match="max_document_bytes was 4000 and is now 134217728"):
        run(replace(options, on_bad_file="skip"))
    bpe = replace(limited, out=str(tmp_path / "bpe"), tokenizer="bpe:512", on_bad_file="skip")
    assert run(bpe).totals.bad == 1
    with pytest.raises(ConfigError, match="max_document_bytes=0 must be at least 1"):
        run(replace(options, max_document_bytes=0))


def test_a_dataset_of_a_version_without_the_option_is_still_complete(
    options: PrepareOptions, documents: list[str], run: Run
) -> None:
    index = run(options)
    note = Path(options.out) / "prepare.json"
    state = json.loads(note.read_text())
    del state["options"]["max_document_bytes"]
    note.write_text(json.dumps(state))
    assert run(options) == index


def test_texts_of_other_readers_are_bounded_too(
    tmp_path: Path, tokenizer: HFTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"word " * 1000))
    assert DataConfig(path="").max_document_bytes == MAX_DOCUMENT_BYTES
    assert TextSet.load(path, tokenizer, max_document_bytes=5000).num_bytes > 4900
    with pytest.raises(DataError, match="max_document_bytes=4999"):
        TextSet.load(path, tokenizer, max_document_bytes=4999)
    with pytest.raises(DataError, match="max_document_bytes=4999"):
        distinct.tokenise(
            [str(path)], tokenizer, 8, most_tokens=64, suffixes=[], text_key="text", max_document_bytes=4999
        )
    example = {"query": "q" * 3000, "choices": ["a", "b"], "gold": 0}
    task = write(tmp_path / local.FILES["piqa"], f"{json.dumps(example)}\n".encode())
    assert local.find_files(tmp_path, ["piqa"])[0]
    monkeypatch.setattr(local, "MAX_DOCUMENT_BYTES", 2000)
    with pytest.raises(ConfigError, match=rf"{task.name} line 1 is longer than 2000 bytes"):
        local.find_files(tmp_path, ["piqa"])
