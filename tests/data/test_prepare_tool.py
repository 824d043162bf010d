import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tide_mega.data.index import DatasetIndex

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"


def run_tool(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *words], capture_output=True, text=True, timeout=300)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for i in range(20):
        (tmp_path / "in" / f"{i}.txt").write_text(f"document {i} says: the quick brown fox " * 5)
    return tmp_path / "in"


@pytest.mark.slow
def test_the_tool_prepares_with_two_workers_and_then_has_nothing_to_do(corpus: Path, tmp_path: Path) -> None:
    words = (f"inputs={corpus}", f"out={tmp_path / 'out'}", "tokenizer=bpe:512", "workers=2")
    words += ("unit_bytes=1000", "validation_fraction=0.3")
    first = run_tool(*words)
    assert first.returncode == 0, first.stderr
    assert "tokenising: 100%" in first.stderr
    assert "training tokens in" in first.stdout
    assert DatasetIndex.load(tmp_path / "out").totals.documents == 20
    again = run_tool(*words)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout


@pytest.mark.slow
def test_mistakes_are_one_sentence_and_a_status(corpus: Path, tmp_path: Path) -> None:
    words = [f"inputs={corpus}", f"out={tmp_path / 'out'}", "tokenizer=bpe:512", "workers=1"]
    unknown = run_tool(*words, "shard_size=3")
    assert unknown.returncode == 2
    assert "shard_size" in unknown.stderr
    refused = run_tool(*words, "on_bad_file=maybe")
    assert (refused.returncode, refused.stderr) == (
        2,
        "error: on_bad_file=maybe is unknown; use fail or skip\n",
    )
    (corpus / "bad.txt").write_bytes(b"\x00")
    bad = run_tool(*words)
    assert bad.returncode == 1
    assert "error: in/bad.txt has a NUL byte at offset 0" in bad.stderr
    assert "Traceback" not in unknown.stderr + refused.stderr + bad.stderr


@pytest.mark.slow
def test_help_lists_every_option() -> None:
    shown = run_tool("--help")
    assert shown.returncode == 0
    for name in ("inputs", "tokenizer", "on_bad_file", "overwrite", "validation_fraction"):
        assert name in shown.stdout


@pytest.mark.slow
def test_folders_that_refuse_fsync_are_said_once_by_all_processes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "sitecustomize.py").write_text(
        "import errno, os, stat\n"
        "fsync = os.fsync\n"
        "def refuse(descriptor):\n"
        "    if stat.S_ISDIR(os.fstat(descriptor).st_mode):\n"
        "        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))\n"
        "    fsync(descriptor)\n"
        "os.fsync = refuse\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'early'}:{TOOL.parents[1]}")
    prepared = run_tool(
        f"inputs={corpus}", f"out={tmp_path / 'out'}", "tokenizer=bpe:512", "workers=2", "unit_bytes=1000"
    )
    assert prepared.returncode == 0, prepared.stderr
    assert prepared.stderr.count("does not write a folder to disk on demand (Invalid argument)") == 1


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_command_continues(corpus: Path, tmp_path: Path) -> None:
    words = (f"inputs={corpus}", f"out={tmp_path / 'out'}", "tokenizer=bpe:512", "workers=1")
    full = subprocess.run(
        [sys.executable, str(TOOL), *words],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].startswith("error: [Errno 27] File too large")
    assert "Traceback" not in full.stderr
    assert run_tool(*words).returncode == 0
