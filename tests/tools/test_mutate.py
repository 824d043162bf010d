"""The mutation tool: what it plants, and what becomes of it."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.tools import tool_module
from tide_mega.errors import ConfigError

SOURCE = '''
"""Words."""
from dataclasses import dataclass

@dataclass(frozen=True)
class Bound:
    most: int = 3

def check(value: int, bounds: list[int]) -> int:
    """More words."""
    log.info("1 + 1")
    if value < 0 and not bounds:
        raise ValueError(f"{value - 1} is negative")
    bounds.append(value)
    both = zip(bounds, bounds, strict=True)
    assert value < 10
    value += "a" + "b"
    return value // 2
'''


@pytest.fixture(scope="module")
def tool():
    with tool_module("mutate") as module:
        yield module


def test_words_annotations_decorators_and_assertions_are_left_alone(tool):
    assert sorted(mutant.what for mutant in tool.mutants_of("a.py", SOURCE)) == [
        "0 -> 1",
        "2 -> 3",
        "3 -> 4",
        "bounds.append(value) -> pass",
        "not bounds -> bounds",
        "raise ValueError(f'{value - 1} is negative') -> pass",
        "value += 'a' + 'b' -> pass",
        "value // 2 -> value * 2",
        "value < 0 -> value <= 0",
        "value < 0 and (not bounds) -> value < 0 or not bounds",
    ]


def test_every_file_of_every_room_and_each_of_its_tests_is_there(tool):
    root = Path(tool.__file__).parents[1]
    named = {name for room in tool.ROOMS.values() for file, tests in room.items() for name in (file, *tests)}
    assert not [name for name in sorted(named) if not (root / name).is_file()]


def bare(text):
    return text.replace("(", "").replace(")", "")


def test_each_mutant_is_the_change_that_it_names_and_no_other(tool):
    before = tool.ast.unparse(tool.ast.parse(SOURCE)).splitlines()
    for mutant in tool.mutants_of("a.py", SOURCE):
        after = tool.mutate(SOURCE, mutant).splitlines()
        changed = [line.strip() for line, was in zip(after, before, strict=True) if line != was]
        assert len(changed) == 1
        assert bare(mutant.what.split(" -> ")[1]) in bare(changed[0])


def in_a_process_of_its_own(test):
    """Run a test in a fresh interpreter: the tool forks, and threads of other tests do not survive that."""

    @functools.wraps(test)
    def run(*arguments, **values):
        if os.environ.get("TIDE_TEST_ALONE") == "1":
            test(*arguments, **values)
            return
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        words = ["-q", "-p", "no:cacheprovider", f"{__file__}::{test.__name__}"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words],
            env=environment | {"TIDE_TEST_ALONE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout

    return run


@pytest.fixture
def project(tool, tmp_path, monkeypatch):
    """A project of one module and its test, as the tool's only room."""
    (tmp_path / "tide_mega").mkdir()
    (tmp_path / "tide_mega" / "count.py").write_text(
        "def count(n):\n    i = 0\n    while i < n:\n        i += 1\n    spare = 5\n    return i\n"
    )
    (tmp_path / "test_count.py").write_text(
        "from tide_mega.count import count\n\ndef test_count():\n    assert count(3) == 3\n"
    )
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\npythonpath = ["."]\nmarkers = ["slow", "gpu"]\n'
    )
    monkeypatch.setattr(tool, "ROOMS", {"only": {"tide_mega/count.py": ("test_count.py",)}})
    monkeypatch.setattr(tool, "PRELOADED", ())
    monkeypatch.setattr(tool, "GRACE_SECONDS", 1.0)
    for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@in_a_process_of_its_own
def test_mutants_are_killed_survive_or_never_end_and_the_files_stay(tool, project, capsys):
    source = (project / "tide_mega" / "count.py").read_text()
    out = project / "mutants.json"
    options = tool.MutateOptions(rooms=["only"], count=100, out=str(out))
    judged = tool.judge_rooms(options, tool.Judge(project))
    fates = {of.mutant.what: of.killed for of in judged}
    assert fates == {
        "0 -> 1": False,  # counts from 1 to 3 all the same
        "i < n -> i <= n": True,
        "i += 1 -> pass": True,  # goes on for ever
        "1 -> 2": True,
        "5 -> 6": False,
    }
    assert (project / "tide_mega" / "count.py").read_text() == source
    assert "all             3 of    5 killed (60%)" in tool.summary(judged)
    assert tool.summary(judged).count("SURVIVED") == 2
    assert tool.read_judged(out) == judged
    capsys.readouterr()
    assert tool.judge_rooms(options, SimpleNamespace(copy=project)) == judged, "nothing is judged again"


@pytest.mark.slow
@in_a_process_of_its_own
def test_tests_that_fail_by_themselves_judge_nothing(tool, project):
    (project / "test_count.py").write_text("def test_count():\n    raise SystemError('broken')\n")
    said = tool.judge_rooms(tool.MutateOptions(rooms=["only"]), tool.Judge(project))
    assert said.startswith("test_count.py fails without a mutant") and "broken" in said


def test_every_room_has_files_and_tests(tool):
    for files in tool.ROOMS.values():
        for path, tests in files.items():
            for name in (path, *tests):
                assert (tool.ROOT / name).is_file(), name


@pytest.mark.parametrize(
    ("word", "said"),
    [("rooms=attic", "rooms=attic does not exist: use memory, kernels"), ("count=0", "count=0")],
)
def test_wrong_arguments_are_refused(tool, word, said):
    with pytest.raises(ConfigError, match=said):
        tool.main([word])
