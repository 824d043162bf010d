"""The checkpoint tool: what it lists, finds damaged and finds different."""

import pytest

from tests.support.checkpoints import write_step
from tests.support.tools import tool_module


@pytest.fixture(scope="module")
def tool():
    with tool_module("checkpoints") as module:
        yield module


@pytest.fixture
def run(tmp_path):
    for step in (3, 6):
        write_step(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"


def test_a_list_shows_every_checkpoint(tool, run, capsys):
    assert tool.main(["list", f"path={run}"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["step", "MB", "saved", "state"]
    assert [line.split()[0] for line in lines] == ["3", "6"]
    assert all(line.endswith("not verified") for line in lines)
    assert tool.main(["list", f"path={run}", "checksums=true"]) == 0
    assert capsys.readouterr().out.count("whole") == 2


def test_damage_is_named_and_status_1(tool, run, capsys):
    file = run / "checkpoints" / "step-00000003" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\1\2\3\4")
    assert tool.main(["list", f"path={run}"]) == 0
    assert tool.main(["verify", f"path={run}"]) == 1
    out = capsys.readouterr().out
    assert "rank-00000.safetensors does not have its checksum" in out
    assert "1 of 2 damaged" in out
    assert tool.main(["verify", f"path={run / 'checkpoints' / 'step-00000006'}"]) == 0
    (run / "checkpoints" / "step-00000006" / "manifest.json").unlink()
    assert tool.main(["list", f"path={run / 'checkpoints'}"]) == 1
    assert "manifest.json is missing" in capsys.readouterr().out


def test_a_foreign_file_is_named_and_no_damage(tool, run, capsys):
    (run / "checkpoints" / "step-00000006" / ".DS_Store").write_bytes(b"x")
    (run / "checkpoints" / "step-00000006" / "notes").mkdir()
    (run / "checkpoints" / "step-00000006" / "z\x1b[2J\n").touch()
    assert tool.main(["verify", f"path={run}"]) == 0
    assert r"not part of it, and ignored: .DS_Store, notes, z\x1b[2J\n" in capsys.readouterr().out


def test_differences_are_measured(tool, run, tmp_path, capsys):
    old, new = (run / "checkpoints" / f"step-0000000{step}" for step in (3, 6))
    assert tool.main(["diff", f"path={old}", f"other={old}"]) == 0
    assert "1 of 1 tensors are the same to the last bit, 0 differ" in capsys.readouterr().out
    assert tool.main(["diff", f"path={old}", f"other={new}"]) == 1
    out = capsys.readouterr().out
    assert "master/table" in out and "largest difference 3.000e+00, 128 of 128 differ" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give a command: list, verify, diff"),
        (["lst"], "give a command"),
        (["list", "path=/nowhere"], "path=/nowhere holds no checkpoint"),
        (["diff", "path={run}"], "other=null is not set"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(tool, run, capsys, words, said):
    assert tool.main([word.replace("{run}", str(run)) for word in words]) == 2
    assert said in capsys.readouterr().err
