import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tide_mega.data.prepare.documents import BadRecord, Document, parse_json_line, read_piece
from tide_mega.data.prepare.inputs import find_inputs, plan_units


def read(path: Path, text_key: str = "text", unit_bytes: int = 2**30) -> list[Document | BadRecord]:
    units = plan_units(find_inputs([str(path)], []).files, unit_bytes)
    sizes: list[int] = []
    records = [
        record
        for unit in units
        for piece in unit.pieces
        for record in read_piece(piece, text_key, sizes.append)
    ]
    assert sum(sizes) <= sum(unit.size for unit in units)
    return records


def texts(records: list[Document | BadRecord]) -> list[str]:
    assert all(isinstance(record, Document) for record in records), records
    return [record.text for record in records]  # type: ignore[union-attr]


def the_bad(records: list[Document | BadRecord]) -> BadRecord:
    bad = [record for record in records if isinstance(record, BadRecord)]
    assert len(bad) == 1, records
    return bad[0]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    assert texts(read(write(tmp_path / "a.txt", "é\r\n\tx\r".encode()))) == ["é\r\n\tx\r"]


def test_a_binary_file_is_named_with_the_offset(tmp_path: Path) -> None:
    bad = the_bad(read(write(tmp_path / "a.txt", b"ELF\x00\xff\xfe")))
    assert bad.source == "a.txt"
    assert "NUL byte at offset 3" in bad.reason


def test_invalid_utf8_is_named_with_byte_and_offset(tmp_path: Path) -> None:
    assert "byte 0xff at offset 2" in the_bad(read(write(tmp_path / "a.txt", b"ab\xffcd"))).reason


def test_a_file_that_vanished_is_a_bad_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"x")
    unit = plan_units(find_inputs([str(path)], []).files, 100)[0]
    path.unlink()
    assert "cannot be read" in the_bad(list(read_piece(unit.pieces[0], "text", lambda n: None))).reason


@given(
    documents=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=20),
    unit_bytes=st.integers(1, 60),
    final_newline=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_cut_of_a_jsonl_file_reads_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], unit_bytes: int, final_newline: bool
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in documents]
    path.write_bytes(("\n".join(lines) + "\n" * final_newline).encode())
    assert texts(read(path, unit_bytes=unit_bytes)) == documents


@pytest.mark.parametrize("unit_bytes", [1, 7, 30, 1000])
def test_a_malformed_line_is_named_by_its_number_wherever_the_file_is_cut(
    tmp_path: Path, unit_bytes: int
) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n\n{"text": "three"}\n{"text": \n{"text": "five"}\n')
    records = read(path, unit_bytes=unit_bytes)
    assert the_bad(records).source == "a.jsonl:4"
    assert "not JSON" in the_bad(records).reason
    assert [r.text for r in records if isinstance(r, Document)] == ["one", "three", "five"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"body": "x", "id": 3}', "no key 'text'; its keys are 'body', 'id'"),
        (b"{}", "its keys are none"),
        (b'["text"]', "is a JSON list, not an object"),
        (b'{"text": null}', "of type NoneType"),
        (b'{"text": 5}', "of type int"),
        (b'{"text": "\\ud800x"}', "lone surrogate U+D800 at character 0"),
        (b'{"text": "\xff"}', "byte 0xff at byte of the line 10"),
        (b"\x00\x01\x02", "not JSON"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
    ],
)
def test_bad_json_lines_say_why(line: bytes, reason: str) -> None:
    problem = parse_json_line(line, "text")
    assert isinstance(problem, str)
    assert reason in problem


def test_text_key_chooses_the_key() -> None:
    assert parse_json_line(b'{"text": 1, "content": "yes"}', "content") == Document("yes")


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    assert texts(read(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "x"}\n'))) == ["x"]


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    assert texts(read(write(tmp_path / "a.txt", b"\xef\xbb\xbfx\xef\xbb\xbf"))) == ["x\ufeff"]
    assert "at offset 4" in the_bad(read(write(tmp_path / "b.txt", b"\xef\xbb\xbfx\xff"))).reason


def json_lines(count: int) -> bytes:
    return b"".join(
        json.dumps({"text": f"document {i} " + "x" * (i % 97)}).encode() + b"\n" for i in range(count)
    )


def test_zst_of_several_frames_reads_like_the_plain_file(tmp_path: Path) -> None:
    content = json_lines(500)
    compress = zstandard.ZstdCompressor().compress
    plain = write(tmp_path / "a.jsonl", content)
    framed = write(tmp_path / "b.jsonl.zst", compress(content[:9001]) + compress(content[9001:]))
    assert read(framed) == read(plain)
    assert len(read(framed)) == 500


@pytest.mark.parametrize("streamed", [False, True])
def test_truncated_zst_is_named_and_its_whole_lines_are_kept(tmp_path: Path, streamed: bool) -> None:
    content = json_lines(20_000)
    compressor = zstandard.ZstdCompressor(write_content_size=not streamed, level=1)
    path = write(tmp_path / "a.jsonl.zst", compressor.compress(content)[:-50])
    records = read(path)
    bad = the_bad(records)
    assert bad.source == "a.jsonl.zst"
    assert f"cut off after {len(records) - 1} whole lines" in bad.reason
    whole = read(write(tmp_path / "b.jsonl", content))
    assert records[:-1] == whole[: len(records) - 1]


def test_a_zst_file_that_is_none_is_damaged(tmp_path: Path) -> None:
    assert "zstd stream is damaged" in the_bad(read(write(tmp_path / "a.jsonl.zst", b"not zstd"))).reason


def parquet_file(path: Path, table: dict[str, object], row_group_size: int = 3) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize("unit_bytes", [1, 10**9])
@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_parquet_gives_the_column_in_order_however_it_is_cut(
    tmp_path: Path, unit_bytes: int, kind: str
) -> None:
    wanted = [f"row {i} é" for i in range(10)]
    array = pyarrow.array(wanted, pyarrow.large_string() if kind == "large_string" else pyarrow.string())
    if kind == "dictionary":
        array = array.dictionary_encode()
    path = parquet_file(tmp_path / "a.parquet", {"id": list(range(10)), "text": array})
    assert texts(read(path, unit_bytes=unit_bytes)) == wanted


def test_a_null_in_parquet_is_named_by_its_row(tmp_path: Path) -> None:
    path = parquet_file(tmp_path / "a.parquet", {"text": ["a", "b", "c", "d", None, "f"]})
    records = read(path, unit_bytes=1)
    assert the_bad(records).source == "a.parquet, row 4"
    assert len(records) == 6


def test_parquet_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    path = parquet_file(tmp_path / "a.parquet", {"body": ["a"], "id": [1]})
    assert "no column 'text'; its columns are body, id" in the_bad(read(path)).reason
    assert "of type int64" in the_bad(read(path, text_key="id")).reason


@pytest.mark.parametrize("keep", [0, 4, -20])
def test_damaged_parquet_is_named(tmp_path: Path, keep: int) -> None:
    path = parquet_file(tmp_path / "a.parquet", {"text": ["a"] * 100})
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep >= 0 else len(content) + keep])
    assert "not a readable parquet file" in the_bad(read(path)).reason
