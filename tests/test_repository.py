"""Rules on the repository itself: layout, doors, what an install pulls in, shell scripts."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tide_mega

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {
    *("pyproject.toml", "README.md", "tide_mega", "conf", "slurm", "tools", "tests", "docker"),
    *("LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt"),
}
SOURCES = sorted([*(ROOT / "tide_mega").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])
SCRIPTS = sorted([ROOT / ".ci" / "run", *(ROOT / "slurm").glob("*.sh"), *(ROOT / "tools").glob("*.sh")])
DOORS = {
    "deepspeed": {"tide_mega/parallel/engine.py"},
    "megatron.core.parallel_state": {"tide_mega/parallel/groups.py"},
    "hydra": {"tide_mega/config/hydra_door.py"},
    "webdataset": {"tide_mega/data/shards.py"},
    "wandb": {
        "tide_mega/training/wandb_logger.py",
        "tide_mega/dashboard/offline.py",
        "tide_mega/dashboard/workspace.py",
    },
    "wandb_workspaces": {"tide_mega/dashboard/workspace.py"},
    "lm_eval": {"tide_mega/evaluation/harness.py"},
    "triton": {"tide_mega/kernels/"},
}


def git_files():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def imported_modules(path):
    """Every module an import statement of the file can load, `from a import b` as both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_top_level_is_the_agreed_one():
    names = {file.split("/")[0] for file in git_files()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize("library", DOORS)
def test_a_library_is_imported_behind_its_door_alone(library):
    importers = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(name == library or name.startswith(f"{library}.") for name in imported_modules(path))
    }
    doors = DOORS[library]
    assert {path for path in importers if not any(path.startswith(door) for door in doors)} == set()


def test_the_door_check_sees_every_form_of_import(tmp_path):
    path = tmp_path / "probe.py"
    path.write_text("import a.b\nfrom c.d import e\ndef f():\n    from g import h\n")
    assert set(imported_modules(path)) == {"a.b", "c.d", "c.d.e", "g", "g.h"}


def test_omegaconf_is_met_in_the_door_and_for_missing_alone():
    for path in SOURCES:
        if path.name != "hydra_door.py":
            names = {name for name in imported_modules(path) if name.split(".")[0] == "omegaconf"}
            assert names <= {"omegaconf", "omegaconf.MISSING"}, path


ENTRIES = ["train", "evaluate", "analyze", "demo", "health.__main__"]


@pytest.mark.parametrize("module", [*ENTRIES, "config.hydra_door", "diagnostics.registry"])
def test_help_and_a_wrong_key_do_not_wait_for_torch(module):
    code = f"import sys, tide_mega.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_libraries_are_hushed_before_they_are_imported():
    code = (
        "from tide_mega.config.noise import hush_libraries as hush; hush(); import tide_mega.training.trainer"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("", "")


def test_no_extra_names_what_needs_cuda_to_build():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    names = {
        re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("_", "-") for requirement in declared
    }
    assert not names & {"apex", "flash-attn", "transformer-engine"}
    assert {"dev", "eval", "gpu"} <= set(project["optional-dependencies"])


def test_constraints_pin_a_torch_that_the_project_accepts():
    pinned = re.search(r"^torch==(\d+)\.(\d+)\.\d+$", (ROOT / "constraints.txt").read_text(), flags=re.M)
    assert pinned and (int(pinned[1]), int(pinned[2])) >= (2, 8)


def test_version_licence_and_changelog_agree():
    assert f"## [{tide_mega.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse_and_are_executable(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.name in {"body.sh", "outcome.sh"} or os.access(script, os.X_OK)


def test_shell_scripts_pass_shellcheck():
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def readme_blocks():
    return re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.S | re.M)


def test_the_readme_opens_with_commands_of_one_line():
    first, second, third = readme_blocks()[:3]
    assert [block.count("\n") for block in (first, second, third)] == [1, 1, 1]
    assert "tide_mega.demo" in first and "pytest" in second and "tide_mega.analyze" in third


def test_ci_extracts_the_readmes_commands_as_they_stand(tmp_path):
    source = (ROOT / ".ci" / "run").read_text()
    function = re.search(r"^block\(\) \{.*?^\}", source, flags=re.S | re.M)
    assert function
    (tmp_path / "README.md").write_text(
        "# Title\n\n```bash\npython demo.py && echo '$x \"y\"'\n```\n\ntext\n\n"
        "```\npytest -q\n```\n\n```\nthird\n```\n"
    )
    for number, expected in ((1, "python demo.py && echo '$x \"y\"'\n"), (2, "pytest -q\n")):
        script = f"{function.group(0)}\nblock {number}"
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stdout == expected
