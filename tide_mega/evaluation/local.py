"""Tasks read from JSONL files, for machines that cannot reach the hub."""

from itertools import count
from pathlib import Path
from typing import Any

from tide_mega.config.errors import ConfigError
from tide_mega.data.documents import parse_json_object, problem_of
from tide_mega.data.lines import MAX_DOCUMENT_BYTES, read_line

DEFINITIONS = Path(__file__).parent / "tasks"
"""Their definitions for the harness, one YAML file a task."""

FILES = {
    "arc_challenge": "arc_challenge.jsonl",
    "arc_easy": "arc_easy.jsonl",
    "boolq": "boolq.jsonl",
    "lambada_openai": "lambada_openai.jsonl",
    "openbookqa": "openbook_qa.jsonl",
    "piqa": "piqa.jsonl",
}
_OPEN = ("lambada_openai",)
"""With context and continuation; the others with query, choices and gold."""


def find_files(folder: Path, tasks: list[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the file of each task that has one in the folder, checked, and why each other has none.

    Raises:
        ConfigError: the folder is not there, or a line of a file is not an example.
    """
    if not folder.is_dir():
        raise ConfigError(f"local={folder} is not a folder: give the one with {', '.join(FILES.values())}.")
    files: dict[str, Path] = {}
    absent: dict[str, str] = {}
    for task in tasks:
        if task not in FILES:
            absent[task] = "needs the hub: it has no local version (leave out local=)"
        elif not (path := folder / FILES[task]).is_file():
            absent[task] = f"needs the hub, or {FILES[task]} in the folder of local="
        else:
            _check(path, is_open=task in _OPEN)
            files[task] = path.resolve()
    return files, absent


def _check(path: Path, *, is_open: bool) -> None:
    examples = 0
    with path.open("rb") as file:
        for number in count(start=1):
            line, size = read_line(file, MAX_DOCUMENT_BYTES)
            if size == 0:
                break
            if line is None:
                raise ConfigError(
                    f"{path} line {number} is longer than {MAX_DOCUMENT_BYTES} bytes, which is no example: "
                    "correct the file."
                )
            example = parse_json_object(line)
            if example is None:
                continue
            if problem := example if isinstance(example, str) else _problem(example, is_open=is_open):
                raise ConfigError(f"{path} line {number} {problem}.")
            examples += 1
    if not examples:
        raise ConfigError(f"{path} has no example: leave the task out, or give another folder as local=.")


def _problem(example: dict[str, Any], *, is_open: bool) -> str | None:
    texts = ("context", "continuation") if is_open else ("query",)
    for name in texts:
        if problem := problem_of(example.get(name)):
            return f"has no text under {name!r}: {problem}"
    if is_open:
        return None if example["continuation"] else "has an empty continuation"
    choices, gold = example.get("choices"), example.get("gold")
    if not isinstance(choices, list) or not all(c and problem_of(c) is None for c in choices) or not choices:
        return "has no list of texts under 'choices'"
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        return f"has gold={gold!r}, which is no index of its {len(choices)} choices"
    return None
