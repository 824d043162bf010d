"""The file of rows: what it holds, and what is refused instead of read wrongly."""

import errno
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tide_mega.hf import sidecar_tide
from tide_mega.hf.memory_tide import (
    RowError,
    RowFormat,
    SidecarError,
    SidecarFile,
    read_header,
    verify_sidecar,
    write_sidecar,
)
from tide_mega.hf.sidecar_tide import PAGE, Layout

FORMAT = RowFormat("int8", 3, 70)
V = 97


def some_rows(V: int, K: int = 3, D: int = 70) -> Tensor:
    return torch.randn(V, K, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a file of V rows."""
    path = tmp_path / "memory.tide"
    write_sidecar(path, FORMAT, V, some_rows(V).split(10))
    return path


def flip(path: Path, at: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


# Records of less than a page, of one, of a little more, and of several.
SIZES = [
    ("int8", 3, 70),
    ("bf16", 2, 1024),
    ("int8", 8, 1024),
    ("bf16", 3, 1000),
    ("int4", 1, 4),
    ("fp32", 3, 700),
]


@pytest.mark.parametrize(("kind", "K", "D"), SIZES)
def test_records_touch_no_more_pages_than_they_need(kind: str, K: int, D: int) -> None:
    layout = Layout(RowFormat(kind, K, D), 1000)
    R = layout.format.record_bytes
    end = layout.records_at
    for row in range(1000):
        first = layout.offset(row)
        assert first >= end
        end = first + R
        assert (end - 1) // PAGE - first // PAGE + 1 == -(-R // PAGE)
    assert end <= layout.checksums_at
    assert layout.checksums_at % PAGE == 0


@pytest.mark.parametrize("chunk", [1, 10, 97, 1000])
@pytest.mark.parametrize(("kind", "K", "D"), SIZES)
def test_each_record_comes_back(kind: str, K: int, D: int, chunk: int, tmp_path: Path) -> None:
    format = RowFormat(kind, K, D)
    rows_VKD = some_rows(V, K, D)
    fingerprint = write_sidecar(tmp_path / "a", format, V, rows_VKD.split(chunk))
    expected_VR = format.encode(rows_VKD)
    file = SidecarFile(tmp_path / "a")
    assert file.header.fingerprint == fingerprint
    for row in (0, 1, 50, V - 1):
        into = torch.zeros(format.record_bytes, dtype=torch.uint8)
        file.read_row(row, memoryview(into.numpy()))
        assert torch.equal(into, expected_VR[row])
    parts = list(file.chunks())
    assert torch.equal(torch.cat([records_NR for _, records_NR, _ in parts]), expected_VR)
    file.close()
    verify_sidecar(tmp_path / "a")


def test_chunks_of_a_long_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar_tide, "CHUNK_BYTES", 2 * PAGE)
    file = SidecarFile(path)
    firsts = [first for first, _, _ in file.chunks()]
    assert firsts == list(range(0, V, 2 * (PAGE // FORMAT.record_bytes)))
    assert torch.equal(torch.cat([part for _, part, _ in file.chunks()]), FORMAT.encode(some_rows(V)))
    file.copy(path.with_name("copy"))
    file.close()
    assert path.with_name("copy").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("rows", [0, 1])
def test_none_and_one(rows: int, tmp_path: Path) -> None:
    write_sidecar(tmp_path / "a", FORMAT, rows, [some_rows(rows)])
    verify_sidecar(tmp_path / "a")
    assert read_header(tmp_path / "a").layout.rows == rows


def test_the_basis_comes_back(tmp_path: Path) -> None:
    format = RowFormat("rank", 2, 8, 5)
    basis = torch.linalg.qr(torch.randn(16, 5))[0].T
    rows_VKD = some_rows(20, 2, 8)
    write_sidecar(tmp_path / "a", format, 20, [rows_VKD], basis)
    verify_sidecar(tmp_path / "a")
    file = SidecarFile(tmp_path / "a")
    found = file.basis()
    file.close()
    assert found is not None
    assert torch.equal(found, basis.bfloat16())
    flip(tmp_path / "a", file.header.layout.basis_at + 3)
    with pytest.raises(SidecarError, match=r"the basis in .* is damaged: copy it again"):
        verify_sidecar(tmp_path / "a")


def test_header_is_readable_by_others(path: Path) -> None:
    """Magic, length and CRC-32 of a JSON text, which says where everything lies."""
    page = path.read_bytes()[:PAGE]
    assert page[:8] == b"TIDEROWS"
    text = page[16 : 16 + int.from_bytes(page[8:12], "little")]
    assert zlib.crc32(text) == int.from_bytes(page[12:16], "little")
    fields = json.loads(text)
    assert (fields["kind"], fields["num_blocks"], fields["width"], fields["rows"]) == ("int8", 3, 70, V)
    assert fields["record_bytes"] == FORMAT.record_bytes
    record = path.read_bytes()[fields["records_at"] :][: fields["record_bytes"]]
    assert record == bytes(FORMAT.encode(some_rows(V)[:1])[0].tolist())
    first_checksum = path.read_bytes()[fields["checksums_at"] :][:4]
    assert zlib.crc32(record) == int.from_bytes(first_checksum, "little")


def test_fingerprint_is_of_the_contents(path: Path, tmp_path: Path) -> None:
    fingerprint = read_header(path).fingerprint
    assert write_sidecar(tmp_path / "a", FORMAT, V, [some_rows(V)]) == fingerprint
    changed_VKD = some_rows(V)
    changed_VKD[5, 1] *= 2
    assert write_sidecar(tmp_path / "a", FORMAT, V, [changed_VKD]) != fingerprint
    assert write_sidecar(tmp_path / "a", RowFormat("bf16", 3, 70), V, [some_rows(V)]) != fingerprint


def test_every_bit_of_the_header_counts(path: Path) -> None:
    length = int.from_bytes(path.read_bytes()[8:12], "little")
    for at in range(0, 16 + length, 7):
        flip(path, at)
        with pytest.raises(SidecarError, match=r"is not a file of memory rows|header .* is damaged"):
            read_header(path)
        flip(path, at)
    read_header(path)


@pytest.mark.parametrize("left", [0, 5, 16, 200, PAGE, PAGE + 1, -1])
def test_a_truncated_file(path: Path, left: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:left])
    with pytest.raises(SidecarError, match=r"memory\.tide.*copy it again from where it came"):
        read_header(path)


def test_a_file_that_is_too_long(path: Path) -> None:
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(SidecarError, match=f"has {size + 1:,} bytes instead of {size:,}"):
        read_header(path)


def test_damaged_rows_are_named(path: Path) -> None:
    layout = read_header(path).layout
    flip(path, layout.offset(7) + 3)
    read_header(path)
    with pytest.raises(SidecarError, match=r"1 rows of .* are damaged \(7\)"):
        verify_sidecar(path)
    for row in range(20, 40):
        flip(path, layout.offset(row))
    with pytest.raises(SidecarError, match=r"21 rows .* \(7, 20, 21, 22, 23, 24, 25, 26, 27, 28, \.\.\.\)"):
        verify_sidecar(path)


def test_damaged_checksums(path: Path) -> None:
    flip(path, read_header(path).layout.checksums_at + 9)
    with pytest.raises(SidecarError, match=r"the block of checksums in .* is damaged"):
        read_header(path)


def with_header(path: Path, **fields: object) -> None:
    """Give a file a header that is whole but says something else."""
    content = path.read_bytes()
    text = json.dumps({**json.loads(content[16:PAGE].rstrip(b"\0")), **fields}).encode()
    page = b"TIDEROWS" + len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little") + text
    path.write_bytes(page.ljust(PAGE, b"\0") + content[PAGE:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "has version 2 of its format, this code reads version 1"),
        ({"kind": "int3"}, "says nothing usable .*'int3' is unknown"),
        ({"rows": "many"}, "says nothing usable"),
        ({"rows": -1}, "says nothing usable"),
        ({"width": 80}, "says nothing usable .*layout"),
        ({"group_records": 1}, "says nothing usable .*layout"),
    ],
)
def test_headers_of_others(path: Path, fields: dict[str, object], message: str) -> None:
    with_header(path, **fields)
    with pytest.raises(SidecarError, match=message):
        read_header(path)


def test_contents_that_are_not_the_fingerprints(path: Path) -> None:
    with_header(path, fingerprint="0" * 64)
    with pytest.raises(SidecarError, match="not those of its fingerprint"):
        verify_sidecar(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(
        SidecarError, match="nothing, the file with the memory, cannot be opened: No such file"
    ):
        read_header(tmp_path / "nothing")
    with pytest.raises(SidecarError, match="Is a directory"):
        read_header(tmp_path)


class TestWriting:
    """Whole or absent."""

    def test_too_few_and_too_many_rows(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"96 rows came for .*a instead of 97"):
            write_sidecar(tmp_path / "a", FORMAT, 97, some_rows(96).split(10))
        with pytest.raises(ValueError, match="more than 97 rows came for"):
            write_sidecar(tmp_path / "a", FORMAT, 97, some_rows(98).split(10))
        assert not list(tmp_path.iterdir())

    def test_a_row_that_is_not_finite(self, tmp_path: Path) -> None:
        rows_VKD = some_rows(97)
        rows_VKD[63, 2, 0] = torch.nan
        with pytest.raises(RowError, match="row 63 of memory block 2"):
            write_sidecar(tmp_path / "a", FORMAT, 97, rows_VKD.split(10))
        assert not list(tmp_path.iterdir())

    def test_a_full_disk_is_noticed_before_the_first_row(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def rows() -> Iterator[Tensor]:
            pytest.fail("a row was asked for")
            yield some_rows(97)

        monkeypatch.setattr(os, "posix_fallocate", full)
        size = Layout(FORMAT, V).file_bytes
        message = f"a could not be written: No space left on device; it takes {size:,} bytes there"
        with pytest.raises(SidecarError, match=message):
            write_sidecar(tmp_path / "a", FORMAT, V, rows())
        assert not list(tmp_path.iterdir())

    def test_a_file_system_that_cannot_reserve(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unable(*_: object) -> None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(os, "posix_fallocate", unable)
        write_sidecar(tmp_path / "a", FORMAT, V, [some_rows(V)])
        verify_sidecar(tmp_path / "a")

    @pytest.mark.slow
    def test_a_limit_of_the_size_of_files(self, tmp_path: Path) -> None:
        """What a full disk does, by the operating system's own error."""
        program = (
            "import resource, signal, sys, torch\n"
            "from pathlib import Path\n"
            "from tide_mega.hf.memory_tide import RowFormat, write_sidecar\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
            "write_sidecar(Path(sys.argv[1]), RowFormat('int8', 3, 70), 97, [torch.randn(97, 3, 70)])\n"
        )
        ended = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "a")], capture_output=True, text=True, check=False
        )
        assert "SidecarError" in ended.stderr
        assert "could not be written: File too large" in ended.stderr
        assert not list(tmp_path.iterdir())

    def test_a_file_of_that_name_stays_until_the_new_one_is_whole(self, path: Path) -> None:
        before = path.read_bytes()

        def rows() -> Iterator[Tensor]:
            yield some_rows(50)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_sidecar(path, FORMAT, V, rows())
        assert path.read_bytes() == before
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(SidecarError, match="could not be written: No such file or directory"):
            write_sidecar(tmp_path / "none" / "a", FORMAT, V, [some_rows(V)])
