"""Every class of error that the package defines ends a command in a sentence and a documented status."""

import ast
import builtins
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tide_mega.config.command_line import tool_entry
from tide_mega.errors import Exit, StatedError
from tide_mega.run import console

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "tide_mega").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])
CAUGHT_INSIDE = {
    "DamagedStreamError": "tide_mega/data/prepare/documents.py",
    "DamagedFileError": "tide_mega/data/prepare/documents.py",
    "SkippedError": "tide_mega/lab/figures/make.py",
    "TooLongError": "tools/fuzz_inputs.py",
    "RowError": "tide_mega/export/export.py",
    "SidecarError": "tide_mega/inference/folder.py",
    "TokenizerError": "tide_mega/inference/folder.py",
}
"""Errors that no entry point sees, and the file that catches them."""
OWN_PROTOCOL = {
    "tools/bench_memory_worker.py",
    "tide_mega/lab/bench/mix.py",
    "tide_mega/lab/bench/step_measure.py",
    "tide_mega/lab/bench/decode_disk.py",
}
"""Programs that only the project's own programs start, and which report to these."""


def is_exception(value):
    return isinstance(value, type) and issubclass(value, BaseException)


def error_classes():
    """Every class with an exception among its bases, by name, and its file."""
    found = {name for name, value in vars(builtins).items() if is_exception(value)}
    classes = {}
    defined = [
        (node, path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    while more := [
        (node, path)
        for node, path in defined
        if node.name not in found and any(isinstance(b, ast.Name) and b.id in found for b in node.bases)
    ]:
        for node, path in more:
            found.add(node.name)
            classes[node.name] = path
    return classes


CLASSES = error_classes()
STATED = sorted(CLASSES.keys() - CAUGHT_INSIDE.keys())


def made(name):
    module = CLASSES[name].relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return getattr(importlib.import_module(module), name)("what was wrong, where, and what to do")


def test_the_walk_finds_errors_of_every_kind():
    assert {"ConfigError", "DataError", "CheckpointError", "BrokenReplicaError", "SkippedError"} <= set(
        CLASSES
    )


@pytest.mark.parametrize("name", CAUGHT_INSIDE)
def test_an_inner_error_is_caught_where_it_is_said_to_be(name):
    caught = [
        handler.type
        for handler in ast.walk(ast.parse((ROOT / CAUGHT_INSIDE[name]).read_text(encoding="utf-8")))
        if isinstance(handler, ast.ExceptHandler) and handler.type is not None
    ]
    named = {getattr(part, "id", getattr(part, "attr", "")) for kind in caught for part in ast.walk(kind)}
    assert name in named


@pytest.mark.parametrize("name", STATED)
def test_every_other_error_is_a_sentence_with_a_status(name, capsys, monkeypatch):
    error = made(name)
    assert isinstance(error, StatedError)
    assert error.exit_status in set(Exit) - {Exit.DONE}

    def fails():
        raise error

    left = []
    monkeypatch.setattr(console, "leave_at_once", left.append)
    for entry in (lambda: tool_entry(fails), lambda: fails_in_training(fails)):
        left.clear()
        try:
            entry()
        except SystemExit as ended:
            left.append(ended.code)
            assert capsys.readouterr().err == f"{error}\n"
        assert left == [error.exit_status]


def fails_in_training(fails):
    with console.exit_on_run_error():
        fails()


WITH_CONFIGURATION = """
from tide_mega.config.hydra_door import hydra_entry
from tide_mega.errors import DataError

def main(config):
    raise DataError("what was wrong, where, and what to do")

if __name__ == "__main__":
    hydra_entry(main)
"""


def test_an_entry_point_with_a_configuration_turns_errors_into_sentences(tmp_path):
    (tmp_path / "program.py").write_text(WITH_CONFIGURATION)
    done = subprocess.run(  # of its own: Hydra switches off the loggers of a process
        [sys.executable, tmp_path / "program.py", "experiment=demo_base"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (Exit.DATA, "what was wrong, where, and what to do\n")


def test_every_program_ends_through_one_of_the_entries():
    programs = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
                programs[path.relative_to(ROOT).as_posix()] = ast.unparse(node)
    assert {"tide_mega/train.py", "tide_mega/evaluate.py", "tools/checkpoints.py"} <= set(programs)
    assert {
        name
        for name, body in programs.items()
        if not any(f"{entry}(" in body for entry in ("tool_entry", "hydra_entry"))
    } == OWN_PROTOCOL
