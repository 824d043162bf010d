"""Results of an evaluation, stored as JSON: read, compared by key, written.

`<run folder>/evaluation/zero_shot.json` keeps them from one start to the next.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tide_mega.errors import EvaluationError
from tide_mega.files import parse_json, write_bytes

FILE = "zero_shot.json"
FORMAT = 1
SCORING = 2
"""Version of the scoring; results of another version are kept in the file, but computed again."""


@dataclass(frozen=True)
class Score:
    """A metric over a task's examples."""

    value: float
    """A fraction for accuracies; perplexity as it is."""
    stderr: float | None
    """Standard error of the mean, for perplexity by bootstrap; None if there is none."""


@dataclass(frozen=True)
class Measured:
    """The harness's results of a model on a task."""

    scores: Mapping[str, Score]
    """By the harness's names: acc, acc_norm, perplexity."""
    examples: int
    chance: float | None
    """Accuracy of guessing: the mean of 1 / choices, 0 for an open answer; None if unknown."""
    constant: tuple[float, ...]
    """Accuracy of always giving each answer, if all examples have the same choices (BoolQ); else empty."""
    requests: int
    truncated: int
    """Requests whose context was truncated on the left to fit the model's sequence length."""
    windowed: int
    """Texts longer than a sequence, scored in windows."""
    apart: int
    """Requests whose context and continuation had to be encoded separately."""


@dataclass(frozen=True)
class Key:
    """Everything a result depends on: a result with an equal key is not computed again."""

    checkpoint: str
    """The random, unique id of the save."""
    task: str
    source: str
    """`hub`, or the local file's SHA-256."""
    limit: int | None
    """Requested number of examples; None means all."""
    precision: str
    harness: str
    """Its name and version, and `SCORING`."""

    @property
    def is_current(self) -> bool:
        """Whether it is from the current version of the scoring."""
        return self.harness.endswith(f", scoring {SCORING}")


@dataclass(frozen=True)
class Result:
    """One task on one checkpoint."""

    key: Key
    label: str
    """The run's label when it was computed."""
    path: str
    """The checkpoint's path at that time."""
    step: int
    tokens: int
    """Training tokens consumed at the checkpoint."""
    num_blocks: int
    """K."""
    measured: Measured


@dataclass(frozen=True)
class Cell:
    """A number of the comparison, in %; perplexity as it is."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Column:
    """A task of the comparison."""

    task: str
    title: str
    metric: str
    chance: float | None
    """In %; None for perplexity, or if unknown."""
    constant: tuple[float, ...]
    """As in `Measured`, in %."""
    examples: int


@dataclass(frozen=True)
class Comparison:
    """Runs (rows) on tasks (columns), as the paper's Table 2."""

    columns: tuple[Column, ...]
    labels: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]
    """[run][column]."""
    means: tuple[Cell | None, ...]
    """Mean of each run over the tasks with an accuracy; None if there is no such task."""
    mean_chance: float | None
    absent: Mapping[str, str]
    """Tasks that were not evaluated, and why."""
    findings: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass
class Stored:
    """The file's content: every computed result, and the last comparison."""

    results: dict[Key, Result] = field(default_factory=dict)
    comparison: Comparison | None = None

    def write(self, path: Path) -> None:
        """Write it atomically."""
        comparison = None if self.comparison is None else asdict(self.comparison)
        content = {
            "format": FORMAT,
            "results": [asdict(result) for result in self.results.values()],
            "comparison": comparison,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read(path: Path) -> Stored:
    """Read what `Stored.write` wrote.

    Raises:
        EvaluationError: it is not such a file.
        FileNotFoundError: there is no file.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise EvaluationError(
                f"{path} is of format {content['format']}, and this version reads {FORMAT}: move it away, or "
                "give another out=<folder>."
            )
        results = [_result(entry) for entry in content["results"]]
        comparison = content["comparison"] and _comparison(content["comparison"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{path} is not an evaluation's result ({type(error).__name__}: {error}): move it away, or give "
            "another out=<folder>."
        ) from error
    return Stored({result.key: result for result in results}, comparison)


def _result(entry: Mapping) -> Result:
    measured = dict(entry["measured"])
    scores = {name: Score(**score) for name, score in measured.pop("scores").items()}
    measured["constant"] = tuple(measured["constant"])
    rest = {name: value for name, value in entry.items() if name not in ("key", "measured")}
    return Result(key=Key(**entry["key"]), measured=Measured(scores=scores, **measured), **rest)


def _comparison(entry: Mapping) -> Comparison:
    columns = tuple(
        Column(**{**column, "constant": tuple(column["constant"])}) for column in entry["columns"]
    )
    cells = tuple(tuple(Cell(**cell) for cell in row) for row in entry["cells"])
    means = tuple(None if cell is None else Cell(**cell) for cell in entry["means"])
    return Comparison(
        columns,
        tuple(entry["labels"]),
        cells,
        means,
        entry["mean_chance"],
        entry["absent"],
        tuple(entry["findings"]),
        tuple(entry["notes"]),
    )
