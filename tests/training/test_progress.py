import io
from dataclasses import replace

import pytest

from tide_mega.metrics.records import EvalRecord, TextResult, TrainRecord
from tide_mega.training.loggers import Progress, format_count, format_duration, format_eval, format_train

TRAIN = TrainRecord(
    step=120,
    tokens=1_000_000,
    loss=4.87313,
    z_loss=1e-4,
    grad_norm=0.8412,
    grad_norm_tables=0.2134,
    lr=9.75e-5,
    tokens_per_second=12_345.6,
    mfu=0.4123,
    step_seconds=0.2,
    eta_seconds=11_520.0,
    null_weight_by_layer=[0.2, 0.3, None],
)
EVAL = EvalRecord(
    step=120,
    tokens=1_000_000,
    loss=4.5,
    rare=7.25,
    mid=None,
    common=3.5,
    loss_by_bin={},
    count_by_bin={"0": 1_000, "9": 234_000},
    null_weight_by_layer=[],
    null_weight_by_bin={},
)


def test_training_line() -> None:
    assert format_train(TRAIN, 2000) == (
        "step  120/2000 | loss 4.8731 | lr 9.75e-05 | grad norm 0.841 (tables 0.213) | 12.3k tokens/s"
        " | MFU 41.2% | null 0.250 | ETA 3h12m"
    )


def test_training_line_of_a_baseline_without_a_known_peak() -> None:
    record = replace(TRAIN, grad_norm_tables=None, mfu=None, null_weight_by_layer=[])
    assert format_train(record, 120) == (
        "step 120/120 | loss 4.8731 | lr 9.75e-05 | grad norm 0.841 | 12.3k tokens/s | ETA 3h12m"
    )


def test_what_went_wrong_is_in_the_line() -> None:
    record = replace(
        TRAIN, goodput=0.9125, skipped_steps=2, rollbacks=1, slow_ranks=[2, 3], slowest_ratio=2.514
    )
    assert format_train(record, 2000).endswith(
        " | null 0.250 | goodput 91.2% | skipped 2 | rollbacks 1 | slow ranks 2, 3 (2.51 x) | ETA 3h12m"
    )


def test_evaluation_line() -> None:
    assert format_eval(EVAL, 2000) == (
        "step  120/2000 | held-out loss 4.5000 | rare 7.2500 | mid - | common 3.5000 | 235,000 tokens"
    )


def test_evaluation_line_with_texts() -> None:
    wiki = TextResult(4.0, 54.5981, 1.5, 100, None, None, None, {}, {})
    record = replace(EVAL, texts={"wikitext2": wiki, "pubmed": replace(wiki, perplexity=102.0)})
    assert format_eval(record, 2000).endswith(" | 235,000 tokens | perplexity wikitext2 54.60, pubmed 102.00")


def test_lines_are_plain_and_one_a_record() -> None:
    stream = io.StringIO()
    progress = Progress(2000, stream)
    progress.log(TRAIN)
    progress.log(EVAL)
    progress.close()
    assert stream.getvalue() == f"{format_train(TRAIN, 2000)}\n{format_eval(EVAL, 2000)}\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.4, "0"),
        (950, "950"),
        (1_000, "1k"),
        (12_345, "12.3k"),
        (999_499, "999k"),
        (999_900, "1M"),
        (1.25e6, "1.25M"),
        (3e9, "3G"),
    ],
)
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (187, "3m07s"), (18_120, "5h02m"), (187_200, "2d04h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
