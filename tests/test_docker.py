"""The image's recipe, which no machine of the tests can build: its linter, its pins, what it copies."""

import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docker" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)


def instructions():
    """(instruction, arguments) of each, continued lines joined and comments left out."""
    lines = [line for line in TEXT.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines()]


def arguments(name):
    return [text for instruction, text in instructions() if instruction == name]


def test_the_linter_finds_nothing():
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(ROOT / "docker" / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_base_image_and_every_argument_are_pinned_and_used():
    (base,) = arguments("FROM")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-cudnn-devel-ubuntu\d+\.\d+", base)
    for argument in arguments("ARG"):
        name, value = argument.split("=")
        assert re.fullmatch(r"\d+|[0-9a-f]{40}", value), argument
        assert f"${{{name}}}" in TEXT, f"{name} is not used"


def test_what_is_copied_exists():
    for text in arguments("COPY"):
        for source in text.split()[:-1]:
            assert (ROOT / source).exists(), text


def test_an_install_takes_from_the_index_what_a_lock_has_the_hash_of_alone():
    installs = [c for text in arguments("RUN") for c in re.findall(r"pip install[^;&]*", text)]
    assert len(installs) == 4
    for words in map(str.split, installs):
        assert "--no-deps" in words
        (source,) = [word for word in words[2:] if not word.startswith("-")]
        if "-r" in words:
            assert "--require-hashes" in words and source in ("/opt/build.lock", "/opt/requirements.lock")
        else:
            assert source in (".", "/tmp/apex") and "--no-build-isolation" in words


def lock(name):
    """Version and hashes of every package of a lock file; of one with several versions, by platform, the last."""
    text = (ROOT / "docker" / name).read_text()
    entries = re.findall(
        r"^([\w.-]+)==(\S+)[^\n]*((?:\n +--hash=sha256:[0-9a-f]{64}(?: \\)?)*)$", text, flags=re.M
    )
    assert text.count("==") >= len(entries) == len(re.findall(r"^[^#\s]", text, flags=re.M))
    return {package: (version, hashes.split()) for package, version, hashes in entries}


def test_the_lock_has_the_pinned_versions_and_a_hash_of_every_file():
    locked = lock("requirements.lock")
    assert all(hashes for _, hashes in locked.values())
    assert {package: locked[package][0] for package in CONSTRAINTS} == CONSTRAINTS
    built_with = lock("build.lock")
    assert len(built_with) == 3 and built_with.items() <= locked.items()


def test_every_dependency_is_locked_within_its_range():
    locked = lock("requirements.lock")
    for text in chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[requirement.name][0]), text


@pytest.mark.parametrize("name", ["build.lock", "requirements.lock"])
def test_a_lock_names_no_place_of_the_machine_that_made_it(name):
    text = (ROOT / "docker" / name).read_text()
    assert not re.search(r"https?://|file:|find-links|index-url [^-]|(?<![\w.])/\w", text)


def test_every_dependency_is_pinned_within_its_range():
    optional = PROJECT["optional-dependencies"]
    for text in [
        *PROJECT["dependencies"],
        *optional["eval"],
        *optional["sweep"],
        *optional["gpu"],
        *optional["hf"],
    ]:
        requirement = Requirement(text)
        assert requirement.name in CONSTRAINTS, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(CONSTRAINTS[requirement.name]), text


def test_the_layers_are_explained_in_order():
    explained = [int(n) for n in re.findall(r"^#   (\d)\. ", TEXT, flags=re.M)]
    built = [int(n) for n in re.findall(r"^# (\d)[a-z]?\. ", TEXT, flags=re.M)]
    assert explained == sorted(set(built)) and built == sorted(built)


def test_nccl_finds_the_libraries_of_infiniband():
    installed = next(text for text in arguments("RUN") if "apt-get install" in text).split()
    assert {"libibverbs1", "ibverbs-providers", "librdmacm1"} <= set(installed)


def test_nothing_is_compiled_but_apex_with_its_cuda_extensions():
    (building,) = [text for text in arguments("RUN") if "MAX_JOBS" in text]
    assert "APEX_CUDA_EXT=1" in building
    assert building.index("pip install") < building.index('python -c "import torch, amp_C"')
    assert not re.search(
        r"flash|transformer.engine|nvte", " ".join(text for _, text in instructions()).lower()
    )
