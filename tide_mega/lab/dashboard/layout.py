"""The dashboard's layout: every metric a run logs, by section and panel.

W&B's workspace and the plots are both made from it. Also a one-line summary of a run, and the list of what the
dashboard does not show of it.
"""

import math
from collections.abc import Iterable

from tide_mega.data.frequency import BIN_GROUPS, NUM_BINS
from tide_mega.lab.dashboard.history import RunHistory
from tide_mega.lab.dashboard.panel import AXES, Panel, Section, charts

NATS = "nats per token"
NULL = "mean weight of the null bank"
NORM = "mean L2 norm"
DISTANCE = "mean cosine distance"
_OUTSIDE = ("dropped", "unseen")
_WHERE = {0: " (rarest)", NUM_BINS - 1: " (commonest)"}


def _by_decile(title: str, unit: str, prefix: str) -> Panel:
    return Panel(title, unit, tuple(f"{prefix}/{decile}" for decile in range(NUM_BINS)), of="decile")


def _outside(title: str, unit: str, prefix: str) -> Panel:
    return Panel(title, unit, tuple(f"{prefix}/{slot}" for slot in _OUTSIDE))


def _each_decile(title: str, unit: str, pattern: str, of: str) -> tuple[Panel, ...]:
    """Return a panel per decile, with a line for each layer or block, however many there are."""
    return tuple(
        Panel(
            f"{title}, decile {decile}{_WHERE.get(decile, '')}", unit, pattern=f"^{pattern}/{decile}$", of=of
        )
        for decile in range(NUM_BINS)
    )


def _each_outside(title: str, unit: str, pattern: str, of: str) -> tuple[Panel, ...]:
    return tuple(
        Panel(f"{title}, {slot} tokens", unit, pattern=f"^{pattern}/{slot}$", of=of) for slot in _OUTSIDE
    )


def _by_group(title: str, prefix: str) -> Panel:
    return Panel(title, NATS, tuple(f"{prefix}/{group}" for group in BIN_GROUPS))


LOSS_BY_FREQUENCY = Section(
    "Loss by frequency",
    (
        _by_decile("Held-out loss by decile (0 rarest)", NATS, "loss_by_decile"),
        _by_group("Held-out loss: rare, mid, common", "loss"),
        _by_decile("Training loss by decile (0 rarest)", NATS, "train_loss_by_decile"),
        _by_group("Training loss: rare, mid, common", "train_loss"),
        Panel("Loss by decile on text", NATS, pattern="^loss_by_decile_(.+)/[0-9]$", split=True, of="decile"),
        _outside("Held-out loss outside the deciles", NATS, "loss_by_decile"),
        _outside("Training loss outside the deciles", NATS, "train_loss_by_decile"),
        Panel("Loss on texts outside the deciles", NATS, pattern="^loss_by_decile_(.+/(?:dropped|unseen))$"),
    ),
)
LOSS = Section(
    "Loss",
    (
        Panel("Training and held-out loss", NATS, ("train/loss", "eval/loss")),
        Panel("Perplexity of texts", "perplexity", pattern="^perplexity/(.+)$", log_y=True),
        Panel("Bits per byte of texts", "bits per byte", pattern="^bits_per_byte/(.+)$"),
        Panel("Weighted z-loss", NATS, ("train/z_loss",), log_y=True),
        Panel("Gradient norm before clipping", "L2 norm", ("train/grad_norm",), log_y=True),
        Panel("Learning rate", "learning rate", ("lr",)),
    ),
)
ROUTING = Section(
    "Memory: routing",
    (
        Panel("Null weight by layer, training", NULL, pattern=r"^null_weight/layer_(\d+)$", of="layer"),
        Panel("Null weight by layer, held-out", NULL, pattern=r"^null_weight_eval/layer_(\d+)$", of="layer"),
        _by_decile("Null weight by decile, mean of layers", NULL, "null_weight_by_decile_mean"),
        _by_decile("Null weight by decile, last layer", NULL, "null_weight_by_decile_last"),
        *_each_decile("Null weight by layer", NULL, r"null_weight_by_decile_layer_(\d+)", "layer"),
        *_each_decile(
            "Training null weight by layer", NULL, r"train_null_weight_by_decile_layer_(\d+)", "layer"
        ),
        _outside("Null weight outside the deciles, mean of layers", NULL, "null_weight_by_decile_mean"),
        _outside("Null weight outside the deciles, last layer", NULL, "null_weight_by_decile_last"),
        *_each_outside("Null weight by layer", NULL, r"null_weight_by_decile_layer_(\d+)", "layer"),
        *_each_outside(
            "Training null weight by layer", NULL, r"train_null_weight_by_decile_layer_(\d+)", "layer"
        ),
    ),
)
TABLES = Section(
    "Memory: tables",
    (
        _by_decile("Norm of memory rows by decile", NORM, "table_norm_by_decile"),
        _by_decile("Norm of embedding rows by decile", NORM, "embedding_norm_by_decile"),
        Panel(
            "Gradient norm of each table",
            "L2 norm",
            pattern=r"^table_grad_norm/block_(\d+)$",
            of="block",
            log_y=True,
        ),
        Panel("Gradient norm of all tables", "L2 norm", ("train/grad_norm_tables",), log_y=True),
        Panel(
            "Distance of tables from the embedding",
            DISTANCE,
            pattern=r"^table_cosine_distance/e_(\d+)$",
            of="block",
        ),
        Panel(
            "Distance between tables",
            DISTANCE,
            pattern=r"^table_cosine_distance/(\d+_\d+)$",
            of="blocks",
        ),
        *_each_decile("Norm of each table's rows", NORM, r"table_norm_by_decile_block_(\d+)", "block"),
        _outside("Norm of memory rows outside the deciles", NORM, "table_norm_by_decile"),
        _outside("Norm of embedding rows outside the deciles", NORM, "embedding_norm_by_decile"),
        *_each_outside("Norm of each table's rows", NORM, r"table_norm_by_decile_block_(\d+)", "block"),
    ),
)
SPEED = Section(
    "Speed",
    (
        Panel("Throughput", "tokens per second", ("throughput/tokens_per_second",)),
        Panel("Model FLOPs utilisation", "share of peak (0 to 1)", ("throughput/mfu",)),
        Panel("Step time", "seconds", ("throughput/step_seconds",)),
        Panel(
            "Memory of the process that uses most",
            "GB",
            ("throughput/memory_gb", "throughput/peak_memory_gb"),
        ),
        Panel("Goodput", "share of wall time (0 to 1)", ("throughput/goodput",)),
        Panel("Exchanged by rank 0 in a step", "MB", ("throughput/exchanged_mb_per_step",)),
        Panel("Bytes of rank 0 since the last record", "bytes", pattern="^traffic/(.+)$"),
    ),
)
FAULTS = Section(
    "Faults and events",
    (
        Panel("Faults so far", "count", ("faults/skipped_steps", "faults/spikes", "faults/rollbacks")),
        Panel("Data left out so far", "count", ("faults/skipped_windows", "faults/skipped_shards")),
        Panel("Slowest replica", "computing time over median's", ("faults/slowest_ratio",)),
        Panel("Events", "at step", ("events/skipped", "events/spike", "events/rollback"), points=True),
        Panel("Loss at events", NATS, ("events/loss",), points=True),
        Panel("Robust z-score at events", "standard deviations", ("events/z_score",), points=True),
    ),
)
SECTIONS = (LOSS_BY_FREQUENCY, LOSS, ROUTING, TABLES, SPEED, FAULTS)
"""From top to bottom, the most important first."""


def uncovered(names: Iterable[str]) -> list[str]:
    """Return the metrics that no panel shows."""
    panels = [panel for section in SECTIONS for panel in section.panels]
    return sorted({n for n in names if n not in AXES and not any(panel.shows(n) for panel in panels)})


_FIGURES = (
    ("train/loss", "training loss"),
    ("eval/loss", "held-out loss"),
    ("loss/rare", "rare"),
    ("loss/mid", "mid"),
    ("loss/common", "common"),
)


def summary(run: RunHistory) -> str:
    """Return a line with the run's progress and its last losses in nats per token."""
    if not run.rows:
        return f"{run.label}: nothing was logged in {run.source}"
    last = max(run.rows, key=lambda row: row["step"])
    parts = [
        f"{len(run.rows)} records, {len(run.names())} metrics",
        f"step {last['step']:,}",
        f"{last['tokens']:,} tokens",
    ]
    for name, words in _FIGURES:
        if len(values := run.series(name).value):
            parts.append(f"{words} {values[-1]:.3f}")
    return f"{run.label}: {', '.join(parts)} ({run.source})"


def remarks(run: RunHistory) -> list[str]:
    """Return notes on what was not read, is not a number, or has no panel."""
    not_finite = {
        name: count
        for name in run.names()
        if (count := sum(not math.isfinite(value) for value in run.series(name).value))
    }
    said = list(run.notes)
    said += [f"{name}: {count} values are not finite, and not drawn" for name, count in not_finite.items()]
    if alone := uncovered(run.names()):
        said.append(f"no panel shows {', '.join(alone)}; series.csv has them")
    return said


def panels_without_data(names: Iterable[str]) -> list[str]:
    """Return the titles of panels that none of these metrics belongs to."""
    known = list(names)
    return [panel.title for section in SECTIONS for panel in section.panels if not charts(panel, known)]
