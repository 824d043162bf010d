"""Odd but legal inputs: each is read, counted or named, in one line and with no traceback."""

import gzip
import io
import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tide_mega.data.index import DatasetIndex
from tide_mega.data.prepare.options import PrepareOptions
from tide_mega.data.prepare.pipeline import prepare
from tide_mega.errors import ConfigError, DataError

Run = Callable[[PrepareOptions], DatasetIndex]
MARK = b"\xef\xbb\xbf"
GOOD = b'{"text": "good"}\n'


def parquet(names: list[str], *columns: object) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays([*map(pyarrow.array, columns)], names=names), buffer
    )
    return buffer.getvalue()


def json_of(value: object, indent: int | None = None) -> bytes:
    return json.dumps(value, indent=indent).encode()


# Name, content, documents, empty documents, empty files, the reasons of bad records.
CASES: dict[str, tuple[str, bytes, tuple[int, int, int], list[str]]] = {
    "mark": ("a.jsonl", MARK + GOOD + MARK + GOOD, (2, 0, 0), []),
    "mark alone": ("a.txt", MARK, (0, 1, 0), []),
    "mark and nothing": ("a.jsonl", MARK + b"\n", (0, 0, 1), []),
    "blank lines": ("a.jsonl", b"\n \r\n\t\n", (0, 0, 1), []),
    "blank lines compressed": ("a.json.gz", gzip.compress(b"\n\n"), (0, 0, 1), []),
    "nothing compressed": ("a.txt.gz", gzip.compress(b""), (0, 1, 0), []),
    "crlf": ("a.ndjson", b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n', (2, 0, 0), []),
    "no final newline": ("a.json", GOOD + GOOD.strip(), (2, 0, 0), []),
    "one object": ("a.json", GOOD.strip(), (1, 0, 0), []),
    "nan": ("a.jsonl", b'{"text": "a", "score": NaN, "other": -Infinity}', (1, 0, 0), []),
    "nul": ("a.jsonl", b'{"text": "a\\u0000b"}', (1, 0, 0), []),
    "surrogates": ("a.jsonl", b'{"text": "\\ud83d\\ude00"}\n{"text": "\\ud83d"}', (1, 0, 0), ["lone surrogate"]),
    "key": ("a.jsonl", b'{"t\\ud800\\n": "a"}', (0, 0, 0), ["no key 'text'; its keys are 't\\ud800\\n'"]),
    "deep": ("a.jsonl", b'{"x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n" + GOOD, (1, 0, 0), ["nested too deeply"]),
    "huge integer": ("a.jsonl", GOOD + b"9" * 5000, (1, 0, 0), ["can be read: Exceeds the limit (4300 digits)"]),
    "no string": ("a.jsonl", b'{"text": 1}\n{"text": null}', (0, 0, 0), ["of type int", "of type NoneType"]),
    "carriage returns": ("a.jsonl", b'{"text": "a"}\r{"text": "b"}', (0, 0, 0), ["is not JSON: Extra data"]),
    "utf-16 lines": ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), (0, 0, 0), ["is UTF-16 by its"]),
    "utf-16 text": ("a.txt", b"\xfe\xff\0a", (0, 0, 0), ["iconv -f UTF-16 -t UTF-8"]),
    "array": ("a.json", json_of([{"text": "x"}] * 2), (0, 0, 0), ["is one JSON array, not JSON lines: write"]),
    "array over lines": ("a.json", json_of([{"text": "x"}] * 2, 1), (0, 0, 0), ["is one JSON array"]),
    "array of lines": ("a.jsonl", b'[\n{"text": "x"},\n{"text": "y"}\n]', (0, 0, 0), ["is one JSON array"]),
    "array marked": ("a.json.gz", gzip.compress(MARK + b"\n[\n1]"), (0, 0, 0), ["is one JSON array"]),
    "object over lines": ("a.json", json_of({"text": "x", "y": [1]}, 1), (0, 0, 0), ["is one JSON object over"]),
    "object with data": ("a.json", b'{"data": [\n{"text": "x"}\n]}', (0, 0, 0), ["is one JSON object over"]),
    "first line cut": ("a.json", b'{"text": "ab\n' + GOOD, (1, 0, 0), ["is not JSON"]),
    "first line cut short": ("a.jsonl", b'{"text":\n' + GOOD, (1, 0, 0), ["is not JSON"]),
    "word": ("a.json", b'"text"\n', (0, 0, 0), ["is a JSON str, not an object"]),
    "columns twice": ("a.parquet", parquet(["text", "text"], ["a"], ["b"]), (0, 0, 0), ["2 columns called"]),
    "others twice": ("a.parquet", parquet(["x", "text", "x"], [1], ["a"], [2]), (1, 0, 0), []),
    "no rows": ("a.parquet", parquet(["text"], pyarrow.array([], pyarrow.string())), (0, 0, 1), []),
    "no columns": ("a.parquet", parquet([]), (0, 0, 0), ["no column 'text'; its columns are none"]),
    "odd column": ("a.parquet", parquet(["a\nb"], ["x"]), (0, 0, 0), ["its columns are a\\nb"]),
    "null rows": ("a.parquet", parquet(["text"], ["a", None, ""]), (1, 1, 0), ["of type NoneType"]),
    "null column": ("a.parquet", parquet(["text"], [None]), (0, 0, 0), ["of type null, not of strings"]),
    "bytes": ("a.parquet", parquet(["text"], [b"x"]), (0, 0, 0), ["of type binary, not of strings"]),
    "struct": ("a.parquet", parquet(["text"], [{"b": "x"}]), (0, 0, 0), ["of type struct<b: string>"]),
    "list": ("a.parquet", parquet(["text"], [["x"]]), (0, 0, 0), ["of type list<element: string>"]),
    "name of lines": ("a\nb.txt", b"\0", (0, 0, 0), ["a\\nb.txt has a NUL byte"]),
    "name of spaces": (" a b .txt", b"x", (1, 0, 0), []),
    "name of bytes": (os.fsdecode(b"\xff.txt"), b"\0", (0, 0, 0), ["\\udcff.txt has a NUL byte"]),
    "empty name of bytes": (os.fsdecode(b"\xff.txt"), b"", (0, 0, 1), []),
    "parquet name of bytes": (os.fsdecode(b"\xff.parquet"), parquet(["text"], ["a"]), (1, 0, 0), []),
    "parquet name of a scheme": ("s3:a%20b?.parquet", parquet(["text"], ["a"]), (1, 0, 0), []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_read_counted_or_named(options: PrepareOptions, run: Run, tmp_path: Path, case: str) -> None:
    name, content, counts, reasons = CASES[case]
    (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in" / "~.txt").write_bytes(b"always there")
    index = run(replace(options, on_bad_file="skip"))
    totals = index.totals
    assert (totals.documents - 1, totals.empty_documents, totals.empty_files) == counts
    assert totals.bad == len(index.bad) == len(reasons)
    for bad, reason in zip(index.bad, reasons, strict=True):
        sentence = f"{bad['source']} {bad['reason']}"
        assert reason in sentence
        assert sentence.isprintable() and str(tmp_path) not in sentence
    assert DatasetIndex.load(options.out) == index
    if reasons:
        with pytest.raises(DataError, match="on_bad_file=skip"):
            run(replace(options, out=str(tmp_path / "strict")))
    else:
        assert run(replace(options, out=str(tmp_path / "strict"))).totals == totals


def test_a_file_of_one_json_value_is_one_bad_file_however_it_is_cut(
    options: PrepareOptions, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "in" / "a.json").write_bytes(json_of([{"text": "x" * 50}] * 20, 1))
    (tmp_path / "in" / "b.txt").write_text("text")
    index = run(replace(options, unit_bytes=100, on_bad_file="skip"))
    assert (index.totals.bad, index.totals.documents) == (1, 1)


def test_a_column_is_found_by_its_whole_name(options: PrepareOptions, run: Run, tmp_path: Path) -> None:
    (tmp_path / "in" / "a.parquet").write_bytes(parquet(["a", "a.b"], [{"b": "inner"}], ["outer"]))
    assert run(replace(options, text_key="a.b")).totals.documents == 1


def test_links_pipes_and_sockets_are_bad_files(options: PrepareOptions, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "a.txt").write_text("text")
    (folder / "broken.txt").symlink_to("gone.txt")
    (folder / "broken").symlink_to("gone")
    (folder / "broken.jsonl").symlink_to("gone.txt")
    (folder / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(folder / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    index = run(replace(options, on_bad_file="skip"))
    assert {bad["source"]: bad["reason"] for bad in index.bad} == {
        "in/broken": "is a link to what does not exist",
        "in/broken.jsonl": "is a link to what does not exist",
        "in/broken.txt": "is a link to what does not exist",
        "in/loop.txt": "is a link in a loop of links",
        "in/pipe.jsonl": "is a named pipe, not a file",
        "in/socket": "is a socket, not a file",
    }
    assert (index.totals.bad, index.totals.documents) == (6, 1)
    with pytest.raises(DataError, match=r"in/broken is a link to what does not exist\. Correct or remove it"):
        run(replace(options, out=str(tmp_path / "strict")))


def test_links_that_are_followed_are_said_and_not_written(options: PrepareOptions, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.txt").write_text("text")
    (tmp_path / "in" / "a.txt").symlink_to(tmp_path / "elsewhere.txt")
    lines: list[str] = []
    prepare(options, log=lines.append, progress=False)
    assert lines[0] == f"links followed: in/a.txt -> {tmp_path / 'elsewhere.txt'}"
    written = [path.read_bytes() for path in Path(options.out).iterdir()]
    assert not [content for content in written if b"elsewhere" in content]


def test_a_mended_link_is_another_input(options: PrepareOptions, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "a.txt").write_text("text")
    (folder / "b.txt").symlink_to("../later.txt")
    skipping = replace(options, on_bad_file="skip")
    run(skipping)
    (tmp_path / "later.txt").write_text("came later")
    with pytest.raises(ConfigError, match="input files are other ones"):
        run(skipping)
    assert run(replace(skipping, overwrite=True)).totals.documents == 2


def test_a_folder_that_cannot_be_listed_is_a_bad_file(
    options: PrepareOptions, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in" / "a.txt").write_text("text")
    (tmp_path / "in" / "closed").mkdir()
    deny(monkeypatch, tmp_path / "in" / "closed")
    index = run(replace(options, on_bad_file="skip"))
    assert index.bad == [{"source": "in/closed", "reason": "is a folder that cannot be listed"}]
    deny(monkeypatch, tmp_path / "in")
    with pytest.raises(ConfigError, match="in, which cannot be read: Permission denied"):
        run(options)


def deny(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    scandir = os.scandir

    def denying(path: str | Path) -> object:
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denying)


def test_what_is_left_out_is_said(options: PrepareOptions, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in ("a.txt", "._a.txt", ".a.txt.swp", "a.txt~", "#a.txt#", ".git/b.txt", ".git/HEAD", "c.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("text")
    (folder / ".#a.txt").symlink_to("somebody@somewhere")
    (folder / "round").symlink_to(folder)
    said: list[str] = []
    index = prepare(options, log=said.append, progress=False)
    assert index.totals.documents == 1
    assert (
        "0 bad files or records, 1 (none), 1 .md, 1 .swp, 1 .txt#, 1 .txt~ files of other kinds, "
        "3 hidden files, 1 folders linked a second time"
    ) in said[-1]


def test_a_suffix_that_is_no_text_is_counted(options: PrepareOptions, run: Run, tmp_path: Path) -> None:
    for name in ("a.txt", os.fsdecode(b"b.\xff"), "c.\n"):
        (tmp_path / "in" / name).write_text("text")
    assert run(options).totals.ignored_files == {".\\n": 1, ".\\udcff": 1}


def test_the_folder_that_is_written_is_no_input(options: PrepareOptions, run: Run, tmp_path: Path) -> None:
    (tmp_path / "in" / "a.txt").write_text("text")
    inside = replace(options, out=str(tmp_path / "in" / "out"))
    index = run(inside)
    assert run(inside) == index


def test_nothing_but_bad_files_is_an_error_that_names_one(
    options: PrepareOptions, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "in" / "a.json").write_bytes(b"[]")
    with pytest.raises(
        DataError, match=r"no document: .*1 bad .*; the first bad one: in/a.json is one JSON array"
    ):
        run(replace(options, on_bad_file="skip"))
