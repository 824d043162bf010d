import errno
import logging
import os
import stat
from pathlib import Path

import pytest

from tide_mega import files


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch):
    """Makes fsync fail with an errno, for folders or for files."""
    monkeypatch.setattr(files, "_refused", set())
    fsync = os.fsync

    def refuse(number: int, *, folders: bool) -> None:
        def failing(descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
                raise OSError(number, os.strerror(number))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", failing)

    return refuse


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS])
def test_a_folder_that_refuses_fsync_is_tolerated_and_said_once(refuse, number, tmp_path, caplog) -> None:
    refuse(number, folders=True)
    with caplog.at_level(logging.WARNING):
        for name in ("a", "b"):
            files.write_bytes(tmp_path / name, b"content")
    assert (tmp_path / "b").read_bytes() == b"content"
    assert len(caplog.messages) == 1
    assert str(tmp_path) in caplog.text and os.strerror(number) in caplog.text


def test_a_folder_that_cannot_be_opened_for_it_is_tolerated(refuse, monkeypatch, tmp_path, caplog) -> None:
    def denied(path, flags):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with caplog.at_level(logging.WARNING):
        files.to_disk(tmp_path)
    assert "Permission denied" in caplog.text


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_that_refuses_fsync_is_an_error(refuse, number, tmp_path) -> None:
    refuse(number, folders=False)
    with pytest.raises(OSError, match=os.strerror(number)):
        files.write_bytes(tmp_path / "a", b"content")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b").write_bytes(b"content")
    with pytest.raises(OSError, match=os.strerror(number)):
        files.to_disk(tmp_path / "b")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_folder_that_fails_otherwise_is_an_error(refuse, number, tmp_path: Path) -> None:
    refuse(number, folders=True)
    with pytest.raises(OSError, match=os.strerror(number)):
        files.to_disk(tmp_path)


def test_a_linked_file_stays_a_link(tmp_path):
    (tmp_path / "scratch").mkdir()
    link = tmp_path / "metrics.jsonl"
    link.symlink_to(tmp_path / "scratch" / "there")
    for content in (b"first", b"second"):
        files.write_bytes(link, content)
        assert link.is_symlink() and link.read_bytes() == content
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["there"]


def test_what_has_the_temporary_files_name_is_never_opened(tmp_path):
    (tmp_path / "theirs").write_bytes(b"kept")
    temporary = tmp_path / f".own.tmp-{os.getpid()}"
    temporary.symlink_to(tmp_path / "theirs")
    files.write_bytes(tmp_path / "own", b"content")
    assert (tmp_path / "own").read_bytes() == b"content" and not (tmp_path / "own").is_symlink()
    assert (tmp_path / "theirs").read_bytes() == b"kept" and not temporary.is_symlink()
