"""Records with a number in every field."""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from tide_mega.metrics.deciles import SLOTS
from tide_mega.metrics.names import eval_metrics, event_metrics, live_metrics, train_metrics, weights_metrics
from tide_mega.metrics.records import (
    EvalRecord,
    EventRecord,
    LiveRecord,
    TextResult,
    TrainRecord,
    WeightsRecord,
)

SIZE = 3
"""Layers and tables of the samples."""
EVENTS = ("skipped", "spike", "rollback")


def filled(record: type, **given: Any) -> Any:
    """Make a record whose every field, however new, has a number, so that its every metric is logged."""
    hints = get_type_hints(record)
    return record(**{f.name: given.get(f.name, _value(hints[f.name])) for f in fields(record)})


def _value(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        return _value(next(one for one in get_args(hint) if one is not type(None)))
    if get_origin(hint) is list:
        return [_value(get_args(hint)[0]) for _ in range(SIZE)]
    if get_origin(hint) is dict:
        return {slot: _value(get_args(hint)[1]) for slot in SLOTS}
    if is_dataclass(hint):
        return filled(hint)
    return {int: 7, float: 0.5, bool: True, str: "x"}[hint]


def train_record(**given: Any) -> TrainRecord:
    traffic = {"row gradients": {"sent": 12, "received": 34}, "ids": {"sent": 5, "received": 6}}
    return filled(TrainRecord, **{"traffic": traffic, "step": 10, "tokens": 1000, **given})


def eval_record(**given: Any) -> EvalRecord:
    by_slot = dict.fromkeys(SLOTS, 0.25)
    texts = {name: filled(TextResult) for name in ("wikitext-2", "pubmed")}
    named = {"null_weight_by_bin": {"mean": by_slot, "last": by_slot}, "texts": texts}
    return filled(EvalRecord, **{**named, "step": 10, "tokens": 1000, **given})


def event_record(event: str = "skipped", **given: Any) -> EventRecord:
    return filled(EventRecord, **{"event": event, "step": 10, "tokens": 1000, **given})


def live_record(**given: Any) -> LiveRecord:
    return filled(LiveRecord, **{"step": 10, "tokens": 1000, **given})


def weights_record(**given: Any) -> WeightsRecord:
    return filled(WeightsRecord, **{"step": 10, "tokens": 1000, **given})


def all_rows() -> list[dict[str, float]]:
    """One row of every kind, as it is logged."""
    return [
        train_metrics(train_record()),
        live_metrics(live_record()),
        eval_metrics(eval_record()),
        weights_metrics(weights_record()),
        *(event_metrics(event_record(event)) for event in EVENTS),
    ]


def all_names() -> list[str]:
    return list(dict.fromkeys(name for row in all_rows() for name in row))


def forget_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep W&B away from this user's login and folders."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))


def renumbered(record: Any, step: int) -> Any:
    return replace(record, step=step, tokens=100 * step)
