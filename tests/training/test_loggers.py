from dataclasses import fields

import pytest

from tide_mega.metrics.deciles import DecileResult, NullWeightResult
from tide_mega.metrics.records import EvalRecord, Record
from tide_mega.training.loggers import Loggers

DECILES = DecileResult(4.0, 3, {"0": 4.0}, {"0": 3}, 4.0, None, None)


class Recorder:
    def __init__(self, name: str, calls: list[tuple[str, str]], broken: bool = False) -> None:
        self.name, self.calls, self.broken = name, calls, broken

    def log(self, record: Record) -> None:
        self.calls.append((self.name, f"eval {record.step}" if isinstance(record, EvalRecord) else "other"))

    def close(self) -> None:
        self.calls.append((self.name, "close"))
        if self.broken:
            raise OSError("disk full")


def record() -> EvalRecord:
    return EvalRecord.of(7, 70, DECILES, NullWeightResult([], [], {}, {}))


def test_every_logger_gets_every_record_in_order() -> None:
    calls: list[tuple[str, str]] = []
    with Loggers([Recorder("a", calls), Recorder("b", calls)]) as loggers:
        loggers.log(record())
    assert calls == [("a", "eval 7"), ("b", "eval 7"), ("b", "close"), ("a", "close")]


def test_all_are_closed_even_where_one_raises() -> None:
    calls: list[tuple[str, str]] = []
    loggers = Loggers([Recorder("a", calls), Recorder("b", calls, broken=True)])
    with pytest.raises(OSError, match="disk full"):
        loggers.close()
    assert calls == [("b", "close"), ("a", "close")]


def test_ranks_without_loggers_do_nothing() -> None:
    with Loggers() as loggers:
        loggers.log(record())


def test_an_evaluation_joins_losses_and_null_weights() -> None:
    null = NullWeightResult([0.25, 0.5], [], {"0": 0.375}, {"0": 0.5})
    joined = EvalRecord.of(7, 70, DECILES, null)
    assert (joined.step, joined.tokens, joined.loss, joined.rare, joined.mid) == (7, 70, 4.0, 4.0, None)
    assert joined.null_weight_by_layer == [0.25, 0.5]
    assert joined.null_weight_by_bin == {"mean": {"0": 0.375}, "last": {"0": 0.5}}
    assert record().null_weight_by_bin == {}
    assert {field.name for field in fields(DecileResult)} - {"tokens"} <= {f.name for f in fields(EvalRecord)}
