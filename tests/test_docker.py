"""The image's recipe, which no machine of the tests can build: its linter, its pins, what it copies."""

import re
import shutil
import subprocess
import sys
import tomllib
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
        assert re.fullmatch(r"[\d.]+(post\d+)?", value), argument
        assert f"${{{name}}}" in TEXT, f"{name} is not used"


def test_what_is_copied_exists():
    for text in arguments("COPY"):
        for source in text.split()[:-1]:
            assert (ROOT / source).exists(), text


def test_every_install_has_the_tests_versions_or_pins_its_own():
    for text in arguments("RUN"):
        for command in re.findall(r"pip install[^;&]*", text):
            assert "-c /opt/constraints.txt" in command
            named = re.findall(r"\"([A-Za-z][\w\-\[\],]*[^\"]*)\"", command)
            assert all("==" in requirement for requirement in named), command


def test_every_dependency_is_pinned_within_its_range():
    optional = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *optional["eval"], *optional["sweep"], *optional["gpu"]]:
        requirement = Requirement(text)
        assert requirement.name in CONSTRAINTS, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(CONSTRAINTS[requirement.name]), text


def test_the_layers_are_explained_in_order():
    explained = [int(n) for n in re.findall(r"^#   (\d)\. ", TEXT, flags=re.M)]
    built = [int(n) for n in re.findall(r"^# (\d)[a-z]?\. ", TEXT, flags=re.M)]
    assert explained == sorted(set(built)) and built == sorted(built)
