"""Where metrics go: the console, metrics.jsonl, and Weights & Biases; the package's only import of wandb.

The console prints one plain line per log step, so that a terminal and a SLURM log read alike. Errors of W&B are
logged once and never stop training.
"""

import logging
import netrc
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO, cast
from urllib.parse import urlsplit

import wandb

import tide_mega
from tide_mega.config.help import keyed
from tide_mega.config.schema import LoggingConfig, TideConfig
from tide_mega.errors import without_credentials
from tide_mega.metrics.jsonl import JsonlLogger
from tide_mega.metrics.names import metrics_of
from tide_mega.metrics.records import EvalRecord, Record, TrainRecord
from tide_mega.run.environment import git_state
from tide_mega.run.folder import RunFolder
from tide_mega.training.outset import ORIGIN, SCHEDULE, Outset

log = logging.getLogger(__name__)


_ROWS = "wandb_rows"
_FORMER_MODES = {"dryrun": "offline", "run": "online"}
"""Former values of WANDB_MODE, which W&B still accepts."""
_TRUE = ("1", "true", "yes", "on", "y", "t")
_SETTINGS = {"init_timeout": 30.0, "finish_timeout": 300.0, "console": "off", "silent": True}


class Progress:
    """Prints records to the console; create it on rank 0 only."""

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        """Take the total steps of the run and the output stream (None: standard output)."""
        self._total_steps = total_steps
        self._stream = stream

    def log(self, record: Record) -> None:
        """Print a line of a window of steps or of an evaluation; live diagnostics are too much for one.

        Events have had a warning in the log.
        """
        match record:
            case TrainRecord():
                self._print(format_train(record, self._total_steps))
            case EvalRecord():
                self._print(format_eval(record, self._total_steps))

    def rewind(self, step: int) -> None:
        """Do nothing: printed lines stay."""

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    def _print(self, line: str) -> None:
        print(line, file=self._stream or sys.stdout, flush=True)


def format_train(record: TrainRecord, total_steps: int) -> str:
    """Return the console line of a training record."""
    norm = f"grad norm {record.grad_norm:.3g}"
    if record.grad_norm_tables is not None:
        norm += f" (tables {record.grad_norm_tables:.3g})"
    parts = [
        _step(record.step, total_steps),
        f"loss {record.loss:.4f}",
        f"lr {record.lr:.2e}",
        norm,
        f"{format_count(record.tokens_per_second)} tokens/s",
    ]
    if record.mfu is not None:
        parts.append(f"MFU {record.mfu:.1%}")
    null = [weight for weight in record.null_weight_by_layer if weight is not None]
    if null:
        parts.append(f"null {sum(null) / len(null):.3f}")
    if record.goodput is not None:
        parts.append(f"goodput {record.goodput:.1%}")
    for name, count in (("skipped", record.skipped_steps), ("rollbacks", record.rollbacks)):
        if count:
            parts.append(f"{name} {count}")
    if record.skipped_windows:
        parts.append(f"windows left out {record.skipped_windows}")
    if record.slow_ranks:
        parts.append(f"slow ranks {', '.join(map(str, record.slow_ranks))} ({record.slowest_ratio:.2f} x)")
    parts.append(f"ETA {format_duration(record.eta_seconds)}")
    return " | ".join(parts)


def format_eval(record: EvalRecord, total_steps: int) -> str:
    """Return the console line of an evaluation."""
    losses = (("loss", record.loss), ("rare", record.rare), ("mid", record.mid), ("common", record.common))
    parts = [f"{name} {'-' if loss is None else f'{loss:.4f}'}" for name, loss in losses]
    held_out = sum(record.count_by_bin.values())
    parts = ["held-out " + parts[0], *parts[1:], f"{held_out:,} tokens"]
    if record.texts:
        texts = (f"{name} {text.perplexity:.2f}" for name, text in record.texts.items())
        parts.append("perplexity " + ", ".join(texts))
    return " | ".join([_step(record.step, total_steps), *parts])


def format_count(value: float) -> str:
    """Format with three digits and a unit: 950, 12.3k, 1.25M."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.0f}"


def format_duration(seconds: float) -> str:
    """Format with at most two units: 42s, 3m07s, 5h02m, 2d04h."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"


def _step(step: int, total_steps: int) -> str:
    return f"step {step:>{len(str(total_steps))}}/{total_steps}"


class WandbLogger:
    """A W&B run whose files lie in the run folder and whose charts use `step` as x-axis."""

    def __init__(
        self,
        config: LoggingConfig,
        run_dir: Path,
        *,
        name: str,
        run_config: dict[str, Any],
        run_id: str | None,
    ) -> None:
        """Open a new W&B run, or resume the run `run_id`.

        Args:
            config: mode (`logging.wandb`), project and entity.
            run_dir: where W&B keeps its files (a `wandb` folder in it).
            name: the run's display name.
            run_config: the resolved configuration, nested, for the record.
            run_id: attribute `run_id` of the run to resume; None starts a new one.
        """
        self._failed = False
        self._rows = _Count(run_dir / _ROWS, goes_on=run_id is not None)
        self.run_id = run_id
        """Id of the W&B run, to be kept in checkpoints; None if there is no run."""
        mode = resolve_mode(config.wandb)
        self._run = None
        if mode != "disabled":
            self._run = self._open(mode, config, run_dir, name, run_config)

    def log(self, record: Record) -> None:
        """Log a record's metrics as one row."""
        if self._run is not None:
            try:
                # Explicit row numbers: at each start of an offline run W&B would count from 0 again.
                self._run.log(metrics_of(record), step=self._rows.next(), commit=True)
            except Exception as error:
                self._report(f"could not log: {error}")

    def rewind(self, step: int) -> None:
        """Do nothing: W&B keeps what was logged, and the repeated steps follow it."""

    def close(self) -> None:
        """Finish the run, waiting up to five minutes for uploads; the local files stay in any case."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._report(f"could not finish the run: {error}")

    def _open(
        self, mode: str, config: LoggingConfig, run_dir: Path, name: str, run_config: dict[str, Any]
    ) -> Any | None:
        settings = _settings(config)
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                run = wandb.init(
                    project=config.wandb_project,
                    entity=config.wandb_entity,
                    name=name,
                    id=self.run_id,
                    # Offline runs cannot be resumed; `wandb sync` merges them by id.
                    resume="allow" if attempt == "online" else None,
                    dir=str(run_dir),
                    mode=cast(Any, attempt),
                    config=_clean(run_config),
                    reinit="create_new",
                    settings=settings,
                )
                self._rows.skip_to(run.step)
                run.define_metric("step")
                run.define_metric("*", step_metric="step")
            except Exception as error:
                why = without_credentials(str(error))
                log.warning("W&B could not start %s: %s; training goes on", attempt, why)
                if attempt == "online":
                    wandb.teardown()  # else its service keeps the id of the run that failed
            else:
                self.run_id = run.id
                where = run.url if attempt == "online" else f"{attempt}, in {run.dir}"
                log.info("W&B run %s (%s)", run.id, where)
                return run
        return None

    def _report(self, what: str) -> None:
        if not self._failed:
            text = "W&B %s; said once, training goes on, metrics.jsonl has every metric"
            log.warning(text, without_credentials(what))
        self._failed = True


class _Count:
    """Numbers the rows of a W&B run over all its starts; the count is kept in a file beside the run."""

    def __init__(self, path: Path, *, goes_on: bool) -> None:
        self._path = path
        kept = path.read_text(encoding="utf-8").strip() if goes_on and path.exists() else ""
        self._next = int(kept) if kept.isdecimal() else 0

    def skip_to(self, least: int) -> None:
        """Continue at `least` or later: W&B's server may have more rows than the file knows of."""
        self._next = max(self._next, least)

    def next(self) -> int:
        """Return the number of the next row; it is on disk before it is used, so a kill never repeats one."""
        self._next += 1
        replacement = self._path.with_suffix(".tmp")
        replacement.unlink(missing_ok=True)  # else a link would be followed
        with replacement.open("x", encoding="utf-8") as file:
            file.write(f"{self._next}\n")
        replacement.replace(self._path)
        return self._next - 1


def _settings(config: LoggingConfig) -> wandb.Settings:
    # By default W&B records the git remote's URL, from git or the environment, including any token in it.
    state = git_state(Path(tide_mega.__file__).parent) or {}
    git = {"git_commit": state.get("commit") or "", "git_remote_url": state.get("remote") or ""}
    chosen: dict[str, Any] = _SETTINGS | git | {"disable_git": not any(git.values())}
    if not config.wandb_machine:
        chosen |= {"disable_git": True, "x_disable_meta": True, "host": "-"}
    known = wandb.Settings.model_fields
    return wandb.Settings(**{key: value for key, value in chosen.items() if key in known})


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    return without_credentials(value) if isinstance(value, str) else value


def resolve_mode(mode: str) -> str:
    """Resolve `logging.wandb`: auto follows WANDB_DISABLED and WANDB_MODE, then whether there is a login."""
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in _TRUE:
        return "disabled"
    if wanted := os.environ.get("WANDB_MODE"):
        return _FORMER_MODES.get(wanted, wanted)
    return "online" if has_login() else "offline"


def has_login() -> bool:
    """Return whether a W&B key is configured in the environment or a netrc file; never prompts."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).hostname
    candidates = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for candidate in candidates:
        try:
            machines = netrc.netrc(Path(candidate).expanduser()).hosts
        except (OSError, netrc.NetrcParseError):
            continue
        # W&B's host name has changed over time, and keys stored under the old names are still read.
        if any(machine == server or "wandb" in machine for machine in machines):
            return True
    return False


class MetricsLogger(Protocol):
    """A destination of records."""

    def log(self, record: Record) -> None:
        """Take a record."""

    def rewind(self, step: int) -> None:
        """Roll back to `step` steps done; later steps will be logged again."""

    def close(self) -> None:
        """Flush and close."""


class Loggers:
    """Passes each record to every logger in order; empty on ranks that do not log."""

    def __init__(self, loggers: Sequence[MetricsLogger] = ()) -> None:
        self._loggers = tuple(loggers)

    def log(self, record: Record) -> None:
        """Pass a record on."""
        for logger in self._loggers:
            logger.log(record)

    def rewind(self, step: int) -> None:
        """Tell every logger that the run goes back to `step` steps done."""
        for logger in self._loggers:
            logger.rewind(step)

    def close(self) -> None:
        """Close every logger, last first, even if one raises."""
        with ExitStack() as stack:
            for logger in self._loggers:
                stack.callback(logger.close)

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_loggers(
    config: TideConfig, folder: RunFolder, outset: Outset, *, total_steps: int, evaluates_again: bool
) -> Loggers:
    """Open console, metrics.jsonl and W&B at the run's current position; keeps W&B's run id in folder and state.

    `evaluates_again`: the run begins by repeating the evaluation of its current step.
    """
    state = outset.state
    known = (folder.read_wandb_id() if config.checkpoint.resume else None) or state.wandb_run_id
    wandb_logger = WandbLogger(
        config.logging,
        folder.path,
        name=config.run.name,
        run_config=keyed(config) | {SCHEDULE: outset.schedule.to_json(), ORIGIN: state.extra.get(ORIGIN)},
        run_id=known,
    )
    state.wandb_run_id = wandb_logger.run_id
    folder.write_wandb_id(wandb_logger.run_id)
    resumed = state.step if outset.is_resumed else None
    jsonl = JsonlLogger(folder.metrics, resumed, state.consumed_tokens, evaluates_again=evaluates_again)
    return Loggers([jsonl, Progress(total_steps), wandb_logger])
