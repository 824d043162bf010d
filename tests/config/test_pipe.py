"""Commands whose reader has gone, through a real pipe that is closed before they write."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.slow import quick_and_slow
from tide_mega.config.command_line import UNREAD, tool_entry
from tide_mega.errors import ConfigError

ROOT = Path(__file__).parents[2]
TOOLS = sorted(
    f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py") if path.name != "bench_memory_worker.py"
)
NAMES = ("train", "demo", "analyze", "evaluate", "export", "generate", "health")
MODULES = [f"tide_mega.{name}" for name in NAMES]
COMMANDS = [*TOOLS, *MODULES]


def run_unread(*words):
    """Start a Python whose standard output nobody reads; its status and standard error."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-W", "ignore", *words]  # libraries' own warnings
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr


QUICK = ["tools/prepare_data.py", "tide_mega.train", "tide_mega.demo"]


@pytest.mark.parametrize("command", quick_and_slow(QUICK, COMMANDS))
def test_help_that_nobody_reads_ends_without_a_word(command):
    words = ["-m", command] if command in MODULES else [command]
    assert run_unread(*words, "--help") == (UNREAD, "")


def test_the_shell_calls_a_command_that_a_closed_pipe_ends_the_same():
    ended = subprocess.run(["bash", "-c", "set -o pipefail; yes | true"], check=False)
    assert ended.returncode == UNREAD


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("print('few words')", UNREAD),  # still in the buffer when the tool returns
        ("print('x' * 1_000_000)", UNREAD),
        ("sys.exit(3)", 3),
        ("return 4", 4),
        ("print('said'); sys.exit(3)", UNREAD),
    ],
)
def test_whatever_a_tool_writes_last(body, status):
    code = (
        "import sys\nfrom tide_mega.config.command_line import tool_entry\n"
        f"def main():\n    {body}\ntool_entry(main)"
    )
    assert run_unread("-c", code) == (status, "")


def test_another_pipe_that_breaks_is_an_error():
    code = (
        "import os\nfrom tide_mega.config.command_line import tool_entry\n"
        "def main():\n    r, w = os.pipe(); os.close(r); os.write(w, b'x')\ntool_entry(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


def ended(main, capsys):
    with pytest.raises(SystemExit) as leaving:
        tool_entry(main)
    return leaving.value.code, capsys.readouterr().err


def test_a_place_that_cannot_be_used_is_a_sentence_and_a_bug_keeps_its_traceback(tmp_path, capsys):
    (tmp_path / "file").touch()
    below, long = tmp_path / "file" / "x", tmp_path / ("x" * 256)
    remedy = "mend it, or choose another place."
    assert ended(lambda: below.mkdir(), capsys) == (
        1,
        f"{below} cannot be used (Not a directory): {remedy}\n",
    )
    assert ended(lambda: long.touch(), capsys) == (
        1,
        f"{long} cannot be used (File name too long): {remedy}\n",
    )
    with pytest.raises(FileNotFoundError):
        tool_entry(lambda: (tmp_path / "forgotten").read_text())


def test_names_with_line_breaks_leave_a_sentence_in_one_line(capsys):
    def main():
        raise ConfigError("text=a\nb\x1b[0m\udcff is not a file: give é.")

    assert ended(main, capsys) == (2, "text=a\\nb\\x1b[0m\\udcff is not a file: give é.\n")
