import io
import os
import subprocess
import tarfile

import pytest

from tide_mega.run import code as code_snapshot
from tide_mega.run.code import keep_code, running_code, take


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


def test_a_change_and_an_added_file_are_in_the_archive_under_another_name(checkout):
    head = commit(checkout)
    (checkout / "tide_mega" / "__init__.py").write_text("VERSION = 2\n")
    (checkout / "tide_mega" / "new.py").write_text("new\n")
    git(checkout, "add", "tide_mega/new.py")
    changed = take(checkout)
    assert changed.id.startswith(head[:12] + "-")
    assert content(changed.archive)["tide_mega/__init__.py"] == "VERSION = 2\n"
    assert content(changed.archive)["tide_mega/new.py"] == "new\n"
    assert b"+VERSION = 2" in changed.patch and b"+new" in changed.patch
    (checkout / "tide_mega" / "new.py").write_text("newer\n")
    assert take(checkout).id != changed.id


def test_what_git_does_not_track_is_named_alone(checkout):
    head = commit(checkout)
    (checkout / "tide_mega" / "new.py").write_text("new\n")
    (checkout / "tide_mega" / "run.log").write_text("ignored\n")
    snapshot = take(checkout)
    assert snapshot.id == head[:12] and "tide_mega/new.py" not in snapshot.files
    assert snapshot.left_out == {"tide_mega/new.py": "not tracked by git"}


def plant_secrets(checkout, outside):
    """Write MARKER wherever it must not be read from; return the names of those places below `checkout`."""
    (outside / "folder").mkdir(parents=True)
    for name in ("key.txt", "folder/values.yaml"):
        (outside / name).write_text("MARKER\n")
    conf = checkout / "conf"
    for name in (
        "linked.yaml",
        "Service.PEM",
        "api_key.yaml",
        ".env.local",
        "secrets/plain.yaml",
        "folder/values.yaml",
    ):
        (conf / name).parent.mkdir(exist_ok=True)
        (conf / name).write_text("a: 1\n")
    if (checkout / ".git").exists():
        git(checkout, "add", "-f", ".")
        git(checkout, "commit", "-q", "-m", "second")
    (conf / "linked.yaml").unlink()
    (conf / "linked.yaml").symlink_to(outside / "key.txt")
    (conf / "folder" / "values.yaml").unlink()
    (conf / "folder").rmdir()
    (conf / "folder").symlink_to(outside / "folder")
    secrets = ["Service.PEM", "api_key.yaml", ".env.local", "secrets/plain.yaml", ".env", "id_ed25519"]
    for name in secrets:
        (conf / name).write_text("MARKER\n")
    return [f"conf/{name}" for name in secrets]


@pytest.mark.parametrize("tracked", [True, False])
def test_secrets_and_links_are_neither_kept_nor_read_but_named(
    checkout, tmp_path, monkeypatch, caplog, tracked
):
    if tracked:
        commit(checkout)
    secrets = plant_secrets(checkout, tmp_path / "outside")
    (checkout / "conf" / "config.yaml").write_text("a: 2\n")
    monkeypatch.setattr(code_snapshot, "running_code", lambda: take(checkout))
    kept = keep_code(tmp_path / "run" / "code")
    snapshot = take(checkout)
    assert snapshot.files == ("conf/config.yaml", "tide_mega/__init__.py")
    assert b"MARKER" not in snapshot.patch and "MARKER" not in "".join(content(snapshot.archive).values())
    assert (b"+a: 2" in snapshot.patch) == tracked, "other changes are shown still"
    for name in [*secrets, "conf/linked.yaml"]:
        assert name in snapshot.left_out and f"{name} (" in caplog.text
    assert kept == snapshot.id


def test_the_folder_and_its_files_are_for_the_owner_alone(checkout, tmp_path, monkeypatch):
    commit(checkout)
    (checkout / "conf" / "config.yaml").write_text("a: 2\n")
    monkeypatch.setattr(code_snapshot, "running_code", lambda: take(checkout))
    folder = tmp_path / "run" / "code"
    folder.mkdir(parents=True, mode=0o755)
    keep_code(folder)
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o600"}
    assert oct(folder.stat().st_mode & 0o777) == "0o700"


def test_changes_are_shown_by_git_itself(checkout, tmp_path):
    commit(checkout)
    git(checkout, "config", "diff.external", f"touch {tmp_path / 'ran'};")
    (checkout / "conf" / "config.yaml").write_text("a: 2\n")
    assert b"+a: 2" in take(checkout).patch and not (tmp_path / "ran").exists()


def test_a_name_that_is_no_text_is_kept(checkout):
    (checkout / "conf" / os.fsdecode(b"\xff.yaml")).write_text("a: 1\n")
    commit(checkout)
    assert os.fsdecode(b"conf/\xff.yaml") in take(checkout).files


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
    assert (
        snapshot.left_out == {"conf/table.yaml": "over 1000000 bytes"}
        and "conf/table.yaml" not in snapshot.files
    )


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
    assert len(snapshot.archive) < 2_000_000
    assert [name for name, why in snapshot.left_out.items() if "not tracked" not in why] == []
