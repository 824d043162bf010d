import io
import subprocess
import tarfile

import pytest

from tide_mega.training import code_snapshot
from tide_mega.training.code_snapshot import keep_code, running_code, take


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    (root / "tide_mega").mkdir(parents=True)
    (root / "tide_mega" / "__init__.py").write_text("VERSION = 1\n")
    (root / "conf").mkdir()
    (root / "conf" / "config.yaml").write_text("a: 1\n")
    (root / "data").mkdir()
    (root / "data" / "corpus.bin").write_bytes(b"0" * 100)
    (root / ".gitignore").write_text("*.log\n")
    return root


def git(root, *words):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    done = subprocess.run(["git", "-C", root, *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(root):
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return git(root, "rev-parse", "HEAD")


def content(archive):
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name: tar.extractfile(member).read().decode() for member in tar}


def test_a_clean_checkout_is_named_after_its_commit(checkout):
    head = commit(checkout)
    snapshot = take(checkout)
    assert snapshot.id == head[:12] and snapshot.patch == b""
    assert content(snapshot.archive) == {
        "tide_mega/__init__.py": "VERSION = 1\n",
        "conf/config.yaml": "a: 1\n",
    }


def test_a_change_and_a_new_file_are_in_the_archive_under_another_name(checkout):
    head = commit(checkout)
    (checkout / "tide_mega" / "__init__.py").write_text("VERSION = 2\n")
    (checkout / "tide_mega" / "new.py").write_text("new\n")
    (checkout / "tide_mega" / "run.log").write_text("ignored\n")
    changed = take(checkout)
    assert changed.id.startswith(head[:12] + "-")
    assert content(changed.archive)["tide_mega/__init__.py"] == "VERSION = 2\n"
    assert content(changed.archive)["tide_mega/new.py"] == "new\n"
    assert "tide_mega/run.log" not in changed.files
    assert b"+VERSION = 2" in changed.patch
    (checkout / "tide_mega" / "new.py").write_text("newer\n")
    assert take(checkout).id != changed.id


def test_without_a_repository_the_content_names_it(checkout):
    (checkout / "tide_mega" / "__pycache__").mkdir()
    (checkout / "tide_mega" / "__pycache__" / "x.pyc").write_bytes(b"x")
    first = take(checkout)
    assert set(first.files) == {"tide_mega/__init__.py", "conf/config.yaml"}
    assert take(checkout) == first, "the same code gives the same bytes"
    (checkout / "conf" / "config.yaml").write_text("a: 2\n")
    assert take(checkout).id != first.id


def test_a_package_in_someone_elses_checkout_is_not_that_commit(checkout):
    (checkout / ".gitignore").write_text("tide_mega\nconf\n")
    head = commit(checkout)
    assert take(checkout).id != head[:12]
    assert "tide_mega/__init__.py" in take(checkout).files


def test_a_large_file_is_left_out_and_named(checkout):
    (checkout / "conf" / "table.yaml").write_bytes(b"#" * 1_000_001)
    snapshot = take(checkout)
    assert snapshot.left_out == ("conf/table.yaml",) and "conf/table.yaml" not in snapshot.files


def test_each_state_of_the_code_is_kept_once(checkout, tmp_path, monkeypatch):
    commit(checkout)
    folder = tmp_path / "run" / "code"
    monkeypatch.setattr(code_snapshot, "running_code", lambda: take(checkout))
    first = keep_code(folder)
    assert keep_code(folder) == first
    (checkout / "conf" / "config.yaml").write_text("a: 3\n")
    second = keep_code(folder)
    assert {path.name for path in folder.iterdir()} == {
        f"{first}.tar.gz",
        f"{second}.tar.gz",
        f"{second}.patch",
    }


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / "code").write_text("a file, not a folder")
    assert keep_code(tmp_path / "code") is None
    assert "could not be kept" in caplog.text


def test_this_package_fits():
    snapshot = running_code()
    assert "tide_mega/training/trainer.py" in snapshot.files and "conf/config.yaml" in snapshot.files
    assert len(snapshot.archive) < 2_000_000 and snapshot.left_out == ()
