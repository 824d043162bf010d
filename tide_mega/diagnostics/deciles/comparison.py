"""The paper's Figure 5 from run folders: held-out loss per frequency decile, runs against a baseline."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tide_mega.diagnostics.deciles.plot import plot_deciles
from tide_mega.diagnostics.deciles.rows import CountRange, Row, build_rows
from tide_mega.diagnostics.deciles.run_losses import DECILES, DecileRun, load_run
from tide_mega.diagnostics.deciles.table import format_table


@dataclass(frozen=True)
class DecileReport:
    """A baseline and the runs compared with it on the same held-out tokens."""

    baseline: DecileRun
    runs: tuple[DecileRun, ...]
    count_ranges: tuple[CountRange | None, ...] | None = None
    """For each decile (None for one without types); None as a whole where they are not known."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no run to compare with the baseline: give at least two run folders")
        labels = [self.baseline.label, *(run.label for run in self.runs)]
        if len(set(labels)) < len(labels):
            raise ValueError(f"labels must differ from each other: {', '.join(labels)}")
        if self.count_ranges is not None and len(self.count_ranges) != len(DECILES):
            raise ValueError(f"count_ranges has {len(self.count_ranges)} entries instead of {len(DECILES)}")
        for run in self.runs:
            _check_same_text(self.baseline, run)

    @property
    def rows(self) -> list[Row]:
        """Deciles from the rarest to the commonest, then rare, mid, common, dropped, unseen, all."""
        return build_rows(self.baseline, self.runs, self.count_ranges)

    def text(self) -> str:
        """Heading, aligned table and findings."""
        return format_table(self.baseline, self.runs, self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON values; what is not finite is None."""
        content = {
            "unit": "nats per token",
            "baseline": asdict(self.baseline),
            "runs": [asdict(run) for run in self.runs],
            "rows": [asdict(row) for row in self.rows],
        }
        return _finite(content)

    def to_csv(self) -> str:
        """The rows, one a line; columns of a run start with its label."""
        out = io.StringIO()
        lines = [_flat(row) for row in self.rows]
        writer = csv.DictWriter(out, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return out.getvalue()

    def write(self, folder: Path) -> None:
        """Write deciles.txt, deciles.json, deciles.csv and deciles.png into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "deciles.txt").write_text(self.text() + "\n", encoding="utf-8")
        content = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        (folder / "deciles.json").write_text(content + "\n", encoding="utf-8")
        (folder / "deciles.csv").write_text(self.to_csv(), encoding="utf-8")
        plot_deciles(self.baseline, self.runs, folder / "deciles.png")


def compare_runs(
    run_dirs: Mapping[str, Path], count_ranges: Sequence[CountRange | None] | None = None
) -> DecileReport:
    """Compare the last evaluations of run folders, given by label, with that of the first.

    Args:
        run_dirs: label to run folder, the baseline first.
        count_ranges: for each decile, the least and greatest count of its types in the training text
            (`DecileTable.count_ranges`).

    Raises:
        ValueError: if a folder has no evaluation, or they were evaluated on different text.
    """
    runs = [load_run(folder, label) for label, folder in run_dirs.items()]
    if not runs:
        raise ValueError("no run folder is given: give the baseline's and at least one more")
    return DecileReport(runs[0], tuple(runs[1:]), None if count_ranges is None else tuple(count_ranges))


def _check_same_text(baseline: DecileRun, run: DecileRun) -> None:
    for slot, tokens in baseline.count_by_slot.items():
        if run.count_by_slot[slot] != tokens:
            raise ValueError(
                f"{run.label!r} and {baseline.label!r} were not evaluated on the same text: slot {slot} has "
                f"{run.count_by_slot[slot]} and {tokens} tokens; use the same data and trainer.eval_sequences"
            )


def _flat(row: Row) -> dict[str, Any]:
    least, greatest = row.count_range or (None, None)
    flat: dict[str, Any] = {"decile": row.name, "role": row.role, "count_min": least, "count_max": greatest}
    flat |= {"tokens": row.tokens, "baseline_loss": row.baseline}
    for label, compared in row.runs.items():
        flat |= {f"{label}_{name}": value for name, value in asdict(compared).items()}
    return flat


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
