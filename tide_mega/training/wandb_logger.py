"""The one door to Weights & Biases. Trouble there is logged once and never stops training."""

import logging
import netrc
import os
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import wandb

import tide_mega
from tide_mega.config.schema import LoggingConfig
from tide_mega.config.urls import without_credentials
from tide_mega.metrics.live_records import LiveRecord, WeightsRecord
from tide_mega.metrics.names import (
    eval_metrics,
    event_metrics,
    live_metrics,
    train_metrics,
    weights_metrics,
)
from tide_mega.metrics.records import EvalRecord, EventRecord, TrainRecord
from tide_mega.training.environment import git_state

log = logging.getLogger(__name__)

_ROWS = "wandb_rows"
_FORMER_MODES = {"dryrun": "offline", "run": "online"}
"""Values of WANDB_MODE that W&B still takes."""
_TRUE = ("1", "true", "yes", "on", "y", "t")
_SETTINGS = {"init_timeout": 30.0, "finish_timeout": 300.0, "console": "off", "silent": True}


class WandbLogger:
    """A W&B run kept in the run folder, its charts drawn over `step`."""

    def __init__(
        self,
        config: LoggingConfig,
        run_dir: Path,
        *,
        name: str,
        run_config: dict[str, Any],
        run_id: str | None,
    ) -> None:
        """Open the run, or the run `run_id` again.

        Args:
            config: mode (`logging.wandb`), project and entity.
            run_dir: where W&B keeps its files (a `wandb` folder in it).
            name: the run's display name.
            run_config: the resolved configuration, nested, for the record.
            run_id: what `run_id` gave in the run that this one resumes, else None.
        """
        self._failed = False
        self._rows = _Count(run_dir / _ROWS, goes_on=run_id is not None)
        self.run_id = run_id
        """Identity of the W&B run, to be kept in checkpoints; None where there is no run."""
        mode = resolve_mode(config.wandb)
        self._run = None
        if mode != "disabled":
            self._run = self._open(mode, config, run_dir, name, run_config)

    def log_train(self, record: TrainRecord) -> None:
        """Log a window of training steps."""
        self._log(train_metrics(record))

    def log_eval(self, record: EvalRecord) -> None:
        """Log an evaluation."""
        self._log(eval_metrics(record))

    def log_live(self, record: LiveRecord) -> None:
        """Log what the tokens of a window of training steps say."""
        self._log(live_metrics(record))

    def log_weights(self, record: WeightsRecord) -> None:
        """Log what the weights look like at an evaluation."""
        self._log(weights_metrics(record))

    def log_event(self, record: EventRecord) -> None:
        """Log a step that was not as it should be."""
        self._log(event_metrics(record))

    def rewind(self, step: int) -> None:
        """Nothing: what was logged stays, and the steps that come again follow it."""

    def close(self) -> None:
        """Finish the run; uploads get five minutes, the files stay in any case."""
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
                    # Offline runs do not resume, they are merged by their id when synchronised.
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
                    wandb.teardown()  # else its service holds the identity of the run that failed
            else:
                self.run_id = run.id
                where = run.url if attempt == "online" else f"{attempt}, in {run.dir}"
                log.info("W&B run %s (%s)", run.id, where)
                return run
        return None

    def _log(self, metrics: dict[str, float]) -> None:
        if self._run is not None:
            try:
                # Numbered by us: W&B would begin at 0 again at each start of an offline run.
                self._run.log(metrics, step=self._rows.next(), commit=True)
            except Exception as error:
                self._report(f"could not log: {error}")

    def _report(self, what: str) -> None:
        if not self._failed:
            text = "W&B %s; said once, training goes on, metrics.jsonl has every metric"
            log.warning(text, without_credentials(what))
        self._failed = True


class _Count:
    """Counts the rows of a W&B run over all its starts, in a file beside it."""

    def __init__(self, path: Path, *, goes_on: bool) -> None:
        self._path = path
        kept = path.read_text(encoding="utf-8").strip() if goes_on and path.exists() else ""
        self._next = int(kept) if kept.isdecimal() else 0

    def skip_to(self, least: int) -> None:
        """Go on from a number at least: what W&B's server has of the run may be more than the file knows."""
        self._next = max(self._next, least)

    def next(self) -> int:
        """Return the number of the next row; written down before it is used, so that a kill repeats none."""
        self._next += 1
        replacement = self._path.with_suffix(".tmp")
        replacement.unlink(missing_ok=True)  # a link would be followed
        with replacement.open("x", encoding="utf-8") as file:
            file.write(f"{self._next}\n")
        replacement.replace(self._path)
        return self._next - 1


def _settings(config: LoggingConfig) -> wandb.Settings:
    # Left to itself, W&B takes the remote's URL from git or the environment, with a token that may be in it.
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
    """What `logging.wandb` comes to: auto follows WANDB_DISABLED and WANDB_MODE, then whether there is a login."""
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in _TRUE:
        return "disabled"
    if wanted := os.environ.get("WANDB_MODE"):
        return _FORMER_MODES.get(wanted, wanted)
    return "online" if has_login() else "offline"


def has_login() -> bool:
    """Whether a W&B key is configured, in the environment or a netrc file; never prompts."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).hostname
    candidates = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for candidate in candidates:
        try:
            machines = netrc.netrc(Path(candidate).expanduser()).hosts
        except (OSError, netrc.NetrcParseError):
            continue
        # W&B has moved its server's name over time, and reads the old names' keys still.
        if any(machine == server or "wandb" in machine for machine in machines):
            return True
    return False
