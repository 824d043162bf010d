"""README, CONTRIBUTING and docs/: what they name is there, and what they say to type can be read."""

import ast
import functools
import importlib
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.tools import tool_module
from tide_mega.config.command_line import sort_words, split_at_commas
from tide_mega.config.help import describe, group_options
from tide_mega.config.hydra_door import compose, parse_tool_cli
from tide_mega.config.schema import TideConfig
from tide_mega.errors import ConfigError

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
KEYS = {entry.key for entry in describe(TideConfig)}
SECTIONS = {key.partition(".")[0] for key in KEYS}
LAUNCHED = {"tide_mega.train", "tide_mega.health"}
"""Modules that take the training's configuration; all others take options of their own."""
FILE_ENDS = ("py", "json", "jsonl", "yaml", "npy", "md", "tide")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
STARTS = ("python ", "torchrun ", "sbatch ", "pytest ", "tools/", "slurm/", ".venv/bin/python ")


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def inline_code(page):
    """What stands between backticks, a break of the line within a paragraph being a space."""
    outside = FENCE.sub("", text_of(page))
    return INLINE.findall(re.sub(r"(?<=\S)\n(?=\S)", " ", outside))


def commands_in(text):
    """Each command of a shell text as words: without comments, assignments in front, and redirections."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        words = list(lexer)
        for is_break, group in itertools.groupby(words, lambda word: word in ("&&", "|", ";", "||")):
            if is_break:
                continue
            command = list(itertools.takewhile(lambda word: word not in ("<", ">", ">>", "2>"), group))
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                command.pop(0)
            if command:
                yield command


def documented(page):
    """Commands of the shell blocks, and of inline code that begins as one."""
    found = [
        words
        for kind, text in FENCE.findall(text_of(page))
        if kind != "python"
        for words in commands_in(text)
    ]
    for code in inline_code(page):
        if code.startswith(STARTS) and "<" not in code:
            found += commands_in(code.replace("…", "").replace("...", ""))
    return found


COMMANDS = sorted({(page, tuple(words)) for page in PAGES for words in documented(page)})
IDS = [f"{page}: {' '.join(words)}"[:90] for page, words in COMMANDS]


def started(words):
    """What a command starts (`tide_mega.X` or a path), its arguments, and processes where torchrun or sbatch says.

    None for what is not the project's.
    """
    words = list(words)
    flags = dict(word.split("=", 1) for word in words if re.match(r"--[\w-]+=\d+$", word))
    processes = int(flags["--nproc-per-node"]) if "--nproc-per-node" in flags else None
    if {"--nodes", "--ntasks-per-node"} <= flags.keys():
        processes = int(flags["--nodes"]) * int(flags["--ntasks-per-node"])
    for place, word in enumerate(words):
        if word == "-m" and words[place + 1].startswith("tide_mega"):
            return words[place + 1], words[place + 2 :], processes
        if re.match(r"(tools|slurm|findings)/[\w-]+\.(py|sh)$", word):
            if flags.get("--gpus-per-node") == "0":  # body.sh then runs the demo
                return "tide_mega.train", ["experiment=demo_tide", *words[place + 1 :]], processes
            return word, words[place + 1 :], processes
    return None


STARTING = [
    pytest.param(*found, id=name)
    for (_, words), name in zip(COMMANDS, IDS, strict=True)
    if (found := started(words)) is not None
]


def test_the_documents_have_commands_of_every_kind():
    names = {param.values[0] for param in STARTING}
    assert {"tide_mega.train", "tide_mega.analyze", "tools/prepare_data.py", "slurm/tide_1b.sh"} <= names
    assert len(STARTING) > 50


class ReadError(Exception):
    """Stands for the work of a tool whose arguments could be read."""


def read_and_stop(schema, argv=None, *, doc):
    parse_tool_cli(schema, argv, doc=doc)
    raise ReadError


def read_training(words, processes=None):
    """Compose and validate what a training's words say; several values of a sweep one by one."""
    flags = {word for word in sort_words(words) if word.startswith("-")}
    words = [word for word in words if not word.startswith("-")]
    if "--cfg" in flags:
        words = [word for word in words if word != "job"]
    for word in words:
        if word.startswith("hydra/"):
            group, _, option = word.partition("=")
            assert (ROOT / "conf" / group / f"{option}.yaml").is_file(), word
    words = [word for word in words if not word.startswith("hydra/")]
    if "--multirun" in flags:
        choices = [
            [f"{key}={value}" for value in split_at_commas(several)]
            for key, _, several in (word.partition("=") for word in words)
        ]
        for point in itertools.product(*choices):
            compose(list(point), world_size=processes)
    elif "--help" not in flags:
        compose(words, world_size=processes)


def read_options(main, module, words, monkeypatch):
    """Have a program read its words, and stop it before it works."""
    monkeypatch.setattr(module, "parse_tool_cli", read_and_stop)
    try:
        main(words)
    except ReadError:
        return
    except SystemExit as ended:
        assert ended.code == 0 and "--help" in words
        return
    raise AssertionError(f"{words} were not read as options")


def has_options(words):
    """Whether a program is started, and not merely named, as in `tools/checkpoints.py verify`."""
    return any("=" in word or word.startswith("--") for word in words)


@pytest.mark.parametrize(("name", "words", "processes"), STARTING)
def test_a_documented_command_exists_and_takes_its_arguments(name, words, processes, monkeypatch, capsys):
    if name.startswith("tide_mega"):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
        if name in LAUNCHED:
            read_training(words, processes)
        elif name == "tide_mega.demo":
            compose(["experiment=demo_tide", *words])
        elif has_options(words):
            module = importlib.import_module(
                name if path.with_suffix(".py").is_file() else f"{name}.__main__"
            )
            read_options(module.main, module, words, monkeypatch)
        return
    assert (ROOT / name).is_file()
    if name == "slurm/chain.sh":
        script = next((place for place, word in enumerate(words) if word.endswith(".sh")), None)
        if script is None:
            return
        name, words = words[script], words[script + 1 :]
        assert (ROOT / name).is_file()
    if name.startswith("slurm/"):
        experiment = re.search(r"^EXPERIMENT=(\w+)$", text_of(name), re.MULTILINE)
        assert experiment or not words
        if experiment:
            read_training([f"experiment={experiment[1]}", "run.name=x", *words])
    elif name.endswith(".py") and has_options(words):
        with tool_module(Path(name).stem) as module:
            if hasattr(module, "read_arguments"):  # of a tool that takes flags as well
                assert module.read_arguments(words)
            else:
                read_options(module.main, module, words, monkeypatch)


def test_wrong_words_would_be_noticed(monkeypatch, capsys):
    with pytest.raises(ConfigError, match=r"did you mean optim\.lr"):
        read_training(["experiment=tide_8e_1b", "optim.l=1", "run.name=x"])
    with pytest.raises(ConfigError, match=r"optim\.lr=fast"):
        read_training(["--multirun", "experiment=tide_8e_1b", "optim.lr=1e-4,fast", "run.name=x"])
    analyze = importlib.import_module("tide_mega.analyze")
    with pytest.raises(AssertionError):
        read_options(analyze.main, analyze, ["run=a", "wich=norms"], monkeypatch)
    assert list(commands_in("A=1 python x.py a=b > out  # why\n")) == [["python", "x.py", "a=b"]]


@pytest.mark.parametrize("page", PAGES)
def test_keys_and_options_of_groups_in_running_text_are_real(page):
    groups = group_options(ROOT / "conf")
    for code in inline_code(page):
        if setting := re.fullmatch(r"(\w+)\.(\w+)(=.*)?", code):
            if setting[1] in SECTIONS and setting[2] not in FILE_ENDS:
                assert f"{setting[1]}.{setting[2]}" in KEYS, code
        elif (choice := re.fullmatch(r"(\w+)=(\w+)", code)) and choice[1] in {
            "parallel",
            "experiment",
            "logging",
        }:
            assert choice[2] in groups[choice[1]], code


@pytest.mark.parametrize("page", PAGES)
def test_tests_extras_and_markers_that_a_page_names_are_there(page):
    project = tomllib.loads(text_of("pyproject.toml"))
    markers = {line.partition(":")[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]}
    text = text_of(page)
    extras = re.findall(r"(?:tide_mega|'\.|-e \.)\[(\w+)\]", text)
    assert set(extras) <= set(project["project"]["optional-dependencies"])
    for words in documented(page):
        if "pytest" in [Path(word).name for word in words]:
            rest = words[[Path(word).name for word in words].index("pytest") :]
            assert all((ROOT / word).exists() for word in rest if word.startswith("tests")), words
            if "-m" in rest:
                assert rest[rest.index("-m") + 1].removeprefix("not ") in markers, words


PATH_IN_TEXT = re.compile(
    r"((?:tide_mega|tools|tests|conf|slurm|docker|docs|findings)/[\w./-]*)(?::([A-Za-z_][\w.]*))?"
)


@functools.cache
def names_in(path):
    """What a module defines at its top, and `Class.name` in its classes."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{inside.name}" for inside in node.body if isinstance(inside, ast.FunctionDef)
            }
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CONTRIBUTING.md"])
def test_files_that_a_page_names_exist_and_define_what_it_says(page):
    for code in inline_code(page):
        if (named := PATH_IN_TEXT.fullmatch(code)) is None or "*" in code:
            continue
        path = ROOT / named[1]
        assert path.exists(), code
        if named[2] is not None:
            assert named[2] in names_in(path), code


def test_the_walkthrough_names_functions_of_every_part_of_the_way():
    named = [code for code in inline_code("docs/walkthrough.md") if PATH_IN_TEXT.fullmatch(code)]
    parts = {code.split("/")[1] for code in named if code.startswith("tide_mega/")}
    assert sum(":" in code for code in named) > 40
    assert {"data", "training", "model", "kernels", "memory", "metrics", "parallel", "checkpoint"} <= parts


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(kept.strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_into_pages_lead_to_headings(page):
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#([^)\s]+)\)", text_of(page)):
        where = (ROOT / page).parent / target if target else ROOT / page
        assert anchor in anchors(where.resolve().relative_to(ROOT)), f"{target}#{anchor}"


def test_the_readme_is_short_and_maps_every_folder_and_package():
    readme = text_of("README.md")
    assert len(re.findall(r"[\w'-]{2,}", FENCE.sub("", readme))) < 1500
    packages = [path.parent for path in (ROOT / "tide_mega").glob("*/__init__.py")]
    packages += [path.parent for path in (ROOT / "tide_mega" / "lab").glob("*/__init__.py")]
    modules = [path for path in (ROOT / "tide_mega").glob("*.py") if path.name != "__init__.py"]
    for folder in packages:
        assert f"| `{folder.relative_to(ROOT / 'tide_mega').as_posix()}/` |" in readme
    for module in modules:
        assert f"`{module.name}`" in readme
    for name in ("tide_mega", "conf", "tools", "slurm", "tests", "docs", "docker", "findings"):
        assert f"| `{name}/` |" in readme


@functools.cache
def said_in_the_source():
    """All texts in the source, one a line; of an f-string its fixed parts, `…` between them."""
    said = []
    for path in [*(ROOT / "tide_mega").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                said.append("".join(map(str, parts)))
    return "\n".join(said)


MESSAGES = [
    quoted
    for _, quoted in re.findall(r"^### (`+ ?)(.*?) ?`+$", text_of("docs/troubleshooting.md"), re.MULTILINE)
]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_is_explained_is_one_that_can_come(message):
    # `refuse` joins "key=value why: remedy.", so that key, reason and remedy are texts of their own.
    fragments = [part.strip(" .,;=:()") for part in re.split(r"…|: |; |(?<=[a-z])=\d+(?= |$)", message)]
    said = said_in_the_source().replace("index.json", "…")
    missing = [part for part in fragments if part and part.replace("index.json", "…") not in said]
    assert missing == []


def test_messages_are_explained():
    assert len(MESSAGES) >= 15


def test_the_configuration_reference_is_up_to_date():
    with tool_module("write_configuration") as tool:
        assert text_of("docs/configuration.md") == tool.reference(ROOT / "conf"), (
            "run: python tools/write_configuration.py out=docs/configuration.md"
        )


def test_the_configuration_reference_has_every_key_and_option():
    page = text_of("docs/configuration.md")
    assert all(f"- `{key}` (" in page for key in KEYS)
    for options in group_options(ROOT / "conf").values():
        assert all(f"| `{name}` |" in page for name in options)


def test_writing_the_reference_does_not_wait_for_torch(tmp_path):
    code = (
        "import runpy, sys; sys.argv = ['x', 'out=reference.md']\n"
        f"try: runpy.run_path({str(ROOT / 'tools' / 'write_configuration.py')!r}, run_name='__main__')\n"
        "except SystemExit as ended: sys.exit(ended.code or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "reference.md").read_text(encoding="utf-8") == text_of("docs/configuration.md")
