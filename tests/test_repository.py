"""Rules on the repository itself: layout, doors, what an install pulls in, shell scripts."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import tide_mega

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {
    *("pyproject.toml", "README.md", "tide_mega", "conf", "slurm", "tools", "tests", "docker"),
    *("docs", "findings", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt"),
}
SOURCES = sorted([*(ROOT / "tide_mega").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])
SCRIPTS = sorted(
    [ROOT / ".ci" / "run", *(p for f in ("slurm", "tools", "findings") for p in (ROOT / f).glob("*.sh"))]
)
DOORS = {
    "deepspeed": {"tide_mega/parallel/engine.py"},
    "megatron.core.parallel_state": {"tide_mega/parallel/groups.py"},
    "hydra": {"tide_mega/config/hydra_door.py"},
    "webdataset": {"tide_mega/data/prepare/shards.py"},
    "wandb": {
        "tide_mega/training/loggers.py",
        "tide_mega/lab/dashboard/workspace.py",
    },
    "wandb_workspaces": {"tide_mega/lab/dashboard/workspace.py"},
    "lm_eval": {"tide_mega/lab/zero_shot/harness.py"},
    "transformers": {"tide_mega/hf/", "tide_mega/lab/bench/decode_peers.py"},
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


ENTRIES = ["train", "evaluate", "analyze", "generate", "demo", "health.__main__", "export.__main__"]


@pytest.mark.parametrize("module", [*ENTRIES, "config.hydra_door", "lab.figures.registry"])
def test_help_and_a_wrong_key_do_not_wait_for_torch(module):
    code = f"import sys, tide_mega.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


START_WITH_NVCC_AND_WITHOUT_GPU = """
from tide_mega.config.command_line import hush_libraries
hush_libraries()
import sys, torch
import tide_mega.training.trainer
from tide_mega.parallel.device import choose_device
from tide_mega.parallel.engine import load_deepspeed

load_deepspeed(choose_device("cpu", 0))
# As in a CUDA build of torch on a machine with the toolkit alone.
sys.modules.pop("torch.utils.cpp_extension", None)
torch.version.cuda = "13.0"
torch.cuda._is_compiled = lambda: True
torch.cuda.is_available = lambda: False
import torch.utils.cpp_extension
assert torch.utils.cpp_extension.CUDA_HOME
"""


def test_libraries_are_hushed_before_they_are_imported(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", START_WITH_NVCC_AND_WITHOUT_GPU],
        cwd=ROOT,
        env={**os.environ, "CUDA_HOME": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert (found.stdout, found.stderr) == ("", "")


def test_what_libraries_log_as_a_warning_is_left_out():
    code = (
        "import logging; from tide_mega.config.command_line import hush_libraries as hush; hush()\n"
        "for name in ('megatron.core.models.gpt.gpt_model', 'torch.utils.cpp_extension', 'megatron.core.other'):\n"
        "    logging.getLogger(name).warning('%s', name)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stderr == "megatron.core.other\n"


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


CONSTRAINTS = ("constraints.txt", ".ci/constraints-newest.txt")
TRITON_OF_TORCH = {"2.13.0": "3.7.1", "2.14.1": "3.8.0"}
"""What the metadata of torch's CUDA builds pins exactly; its CPU builds know no triton."""


def pins(file):
    lines = (ROOT / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("file", CONSTRAINTS)
def test_constraints_pin_versions_that_the_project_accepts(file):
    project, pinned = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"], pins(file)
    for text in project["dependencies"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[requirement.name]), text


@pytest.mark.parametrize("file", CONSTRAINTS)
def test_constraints_pin_the_triton_that_torch_asks_for(file):
    pinned = pins(file)
    assert pinned["triton"] == TRITON_OF_TORCH[pinned["torch"]]
    if version("torch").split("+")[0] == pinned["torch"]:
        asked = [Requirement(text) for text in requires("torch") or () if text.startswith("triton")]
        assert all(one.specifier.contains(pinned["triton"]) for one in asked)


def test_the_two_sets_of_versions_differ_in_torch_megatron_and_transformers_alone():
    known, newest = map(pins, CONSTRAINTS)
    differing = {name for name in known.keys() | newest.keys() if known.get(name) != newest.get(name)}
    assert differing == {"torch", "triton", "megatron-core", "transformers"}


def test_no_torch_is_accepted_that_refuses_bf16_products_into_fp32_sums_on_a_gpu():
    # pytorch/pytorch#167931, first in 2.10: tide_mega/kernels/vocab_loss/chunked.py needs it.
    bound = re.search(r'"torch>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert bound and (int(bound[1]), int(bound[2])) >= (2, 10)
    pinned = re.search(r"^torch==(\d+)\.(\d+)\.\d+$", (ROOT / "constraints.txt").read_text(), flags=re.M)
    assert pinned and (int(pinned[1]), int(pinned[2])) >= (int(bound[1]), int(bound[2]))


def test_version_licence_and_changelog_agree():
    assert f"## [{tide_mega.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence


@pytest.mark.parametrize(
    ("on_path", "in_pyenv", "found"),
    [
        (["3.12"], [], "python3.12"),
        (["broken"], ["3.11.7", "3.12.1"], "versions/3.12.1/bin/python"),
        (["3.11"], ["3.12.1", "3.13.0"], "versions/3.12.1/bin/python"),
        ([], ["3.11.7"], ""),
    ],
)
def test_ci_finds_a_python_for_the_newest_versions(tmp_path, on_path, in_pyenv, found):
    def interpreter(path, says):
        """An executable that runs the check as a Python of that version would."""
        path.parent.mkdir(parents=True, exist_ok=True)
        number = ", ".join(says.split(".")[:2])
        code = f"import sys; sys.version_info = ({number}); exec(sys.argv[1])"
        lines = "exit 127" if says == "broken" else f"shift; exec {sys.executable} -c '{code}' \"$@\""
        path.write_text(f"#!/bin/bash\n{lines}\n")
        path.chmod(0o755)

    for says in on_path:
        interpreter(tmp_path / "bin" / "python3.12", says)
    for says in in_pyenv:
        interpreter(tmp_path / "pyenv" / "versions" / says / "bin" / "python", says)
    function = re.search(
        r"^newest_python\(\) \{.*?^\}", (ROOT / ".ci" / "run").read_text(), flags=re.S | re.M
    )
    assert function
    done = subprocess.run(
        ["/bin/bash", "-c", f"set -euo pipefail; {function.group(0)}\nnewest_python"],
        env={"PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path / "pyenv"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip().endswith(found) and bool(done.stdout.strip()) is bool(found)


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


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_between_documents_lead_to_files(name):
    targets = re.findall(r"\]\((?!https?://)([^)#\s]+)", (ROOT / name).read_text())
    assert [target for target in targets if not (ROOT / name).parent.joinpath(target).exists()] == []


def test_readme_leads_to_every_document():
    readme = (ROOT / "README.md").read_text()
    documents = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").iterdir()]
    assert documents and all(f"({document})" in readme for document in documents)
