import csv
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tide_mega.lab.figures.decile_comparison import (
    DECILES,
    OUTSIDE,
    DecileReport,
    DecileRun,
    compare_runs,
    load_run,
)
from tide_mega.metrics.deciles import SLOTS

COUNTS = [10, 10, 20, 40, 40, 40, 40, 100, 100, 200, 50, 0]
RANGES = [(2**i, 2 ** (i + 1)) for i in range(10)]


def record(losses: list[float | None], *, memory: bool, step: int = 5, tokens: int = 1_000) -> dict[str, Any]:
    """An evaluation as the logger writes it; groups are given made-up means, so that they can be traced."""
    null = {slot: None if slot == "unseen" else i / 16 for i, slot in enumerate(SLOTS)}
    last = {slot: None if slot == "unseen" else i / 32 for i, slot in enumerate(SLOTS)}
    shift = losses[0] or 0.0
    return {
        "step": step,
        "kind": "eval",
        "tokens": tokens,
        "loss": shift / 2,
        "rare": shift + 30.0,
        "mid": shift + 20.0,
        "common": shift + 10.0,
        "loss_by_bin": dict(zip(SLOTS, losses, strict=True)),
        "count_by_bin": dict(zip(SLOTS, COUNTS, strict=True)),
        "null_weight_by_layer": [0.25, 0.75] if memory else [],
        "null_weight_by_bin": {"mean": null, "last": last} if memory else {},
    }


BASE = record([8.0, 7.0, 6.0, 5.0, 4.0, 4.0, 3.0, 3.0, 2.0, 1.0, 0.5, None], memory=False)
TIDE = record([6.0, 5.5, 5.0, 4.5, 3.5, 3.5, 2.75, 2.75, 2.0, 1.5, 0.5, None], memory=True)


def write_run(folder: Path, *records: dict[str, Any], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return folder


def report() -> DecileReport:
    base, tide = DecileRun.from_record("base", BASE), DecileRun.from_record("tide", TIDE)
    return DecileReport(base, (tide,), tuple(RANGES))


def test_slots_are_those_the_training_metrics_write() -> None:
    assert DECILES + OUTSIDE == SLOTS


def test_the_last_evaluation_counts(tmp_path: Path) -> None:
    old = record([9.0] * 12, memory=False, step=1)
    train = {"step": 6, "kind": "train", "loss": 1.0}
    folder = write_run(tmp_path / "base", old, BASE, train, tail='{"step": 9, "kind": "ev')
    run = load_run(folder)
    assert run == DecileRun.from_record("base", BASE)
    assert load_run(folder, "other").label == "other"
    assert (run.step, run.loss_by_slot["0"], run.loss_by_slot["unseen"], run.has_memory) == (
        5,
        8.0,
        None,
        False,
    )


def test_a_folder_without_evaluation_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "empty", {"step": 6, "kind": "train"})
    for missing in (folder, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"{missing.name}/metrics.jsonl holds no evaluation"):
            load_run(missing)


def test_damage_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_run(tmp_path / "a", {"step": 1, "kind": "eval"})
    with pytest.raises(ValueError, match="the evaluation of 'a' has no 'null_weight_by_bin'"):
        load_run(folder)
    folder = write_run(tmp_path / "b", tail='{"oops\n{"step": 2, "kind": "train"}\n')
    with pytest.raises(ValueError, match="holds no evaluation"):
        load_run(folder)
    assert "metrics.jsonl is damaged: line 1 is not JSON" in caplog.text


def test_rows_compare_each_decile_and_group() -> None:
    rows = {row.name: row for row in report().rows}
    assert list(rows) == [*DECILES, "0-2", "3-6", "7-9", "dropped", "unseen", "all"]
    rarest = rows["0"].runs["tide"]
    assert (rows["0"].baseline, rarest.loss, rarest.difference, rarest.percent) == (8.0, 6.0, -2.0, -25.0)
    assert (rows["3"].runs["tide"].null_mean, rows["3"].runs["tide"].null_last) == (3 / 16, 3 / 32)
    assert rows["9"].runs["tide"].difference == 0.5
    assert (rows["3"].count_range, rows["dropped"].count_range, rows["0-2"].count_range) == (
        (8, 16),
        None,
        None,
    )
    assert [rows[str(i)].role for i in range(10)] == ["rare"] * 3 + ["mid"] * 4 + ["common"] * 3
    groups = {rows[name].role: rows[name] for name in ("0-2", "3-6", "7-9")}
    assert {role: row.tokens for role, row in groups.items()} == {"rare": 40, "mid": 160, "common": 400}
    assert {role: row.baseline for role, row in groups.items()} == {"rare": 38.0, "mid": 28.0, "common": 18.0}
    unseen = rows["unseen"].runs["tide"]
    assert (rows["unseen"].tokens, unseen.loss, unseen.difference, unseen.percent) == (0, None, None, None)
    total = rows["all"].runs["tide"]
    assert (rows["all"].tokens, rows["all"].baseline, total.difference) == (650, 4.0, -1.0)
    assert (total.null_mean, total.null_last) == (0.5, 0.75)


def test_text_is_aligned_and_says_what_it_comes_to() -> None:
    text = report().text()
    lines = text.splitlines()
    assert lines[1] == "after 1,000 training tokens each"
    head = next(line for line in lines if line.startswith("decile"))
    columns = ["decile", "role", "count in training", "tokens", "base", "tide", "difference", "%"]
    assert re.split(" {2,}", head) == [*columns, "null (mean)", "null (last)"]
    first = next(line for line in lines if line.startswith("0 "))
    assert first.split() == [
        "0",
        "rare",
        "1-2",
        "10",
        "8.0000",
        "6.0000",
        "-2.0000",
        "-25.00",
        "0.000",
        "0.000",
    ]
    last = next(line for line in lines if line.startswith("all"))
    assert last.split() == ["all", "650", "4.0000", "3.0000", "-1.0000", "-25.00", "0.500", "0.750"]
    numeric = lines[lines.index(head) + 2 : -3]
    assert len({len(line) for line in numeric}) == 1, "the right edge of every row is the same"
    assert "tide: gain in nats +1.0000 on all, +2.0000 on rare, +2.0000 on common tokens" in text
    assert "rare / common = 1.0" in text


def test_text_without_count_ranges_leaves_the_column_out() -> None:
    assert "count in training" not in replace(report(), count_ranges=None).text()


def test_unmatched_training_tokens_are_pointed_out() -> None:
    longer = replace(report().runs[0], tokens=2_000)
    assert "CAUTION: not after the same number of training tokens: base 1,000, tide 2,000" in (
        replace(report(), runs=(longer,)).text()
    )


def test_other_held_out_text_is_refused() -> None:
    other = report().runs[0]
    other = replace(other, count_by_slot={**other.count_by_slot, "4": 41})
    with pytest.raises(
        ValueError, match="'tide' and 'base' were not evaluated on the same text: slot 4 has 41 and 40"
    ):
        replace(report(), runs=(other,))


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="no run to compare"):
        replace(report(), runs=())
    with pytest.raises(ValueError, match="labels must differ"):
        replace(report(), runs=(report().baseline,))
    with pytest.raises(ValueError, match="count_ranges has 1 entries instead of 10"):
        replace(report(), count_ranges=((1, 2),))
    with pytest.raises(ValueError, match="no run folder is given"):
        compare_runs({})


def test_files_hold_the_same_numbers(tmp_path: Path) -> None:
    folders = {"base": write_run(tmp_path / "b", BASE), "tide": write_run(tmp_path / "t", TIDE)}
    made = compare_runs(folders, [None, *RANGES[1:]])
    made.write(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "deciles.json").read_text())
    assert content["rows"][0]["runs"]["tide"]["difference"] == -2.0
    assert content["runs"][0]["null_last_by_slot"]["9"] == 9 / 32
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "deciles.csv").read_text())))
    assert len(lines) == 16
    assert (lines[0]["decile"], lines[0]["count_min"], lines[0]["tide_difference"]) == ("0", "", "-2.0")
    assert (lines[1]["count_min"], lines[1]["count_max"]) == ("2", "4")
    assert (tmp_path / "out" / "deciles.txt").read_text() == made.text() + "\n"


def test_a_diverged_loss_is_shown_and_leaves_json_strict(tmp_path: Path) -> None:
    losses: list[Any] = ["NaN", *TIDE["loss_by_bin"].values()][:1] + list(TIDE["loss_by_bin"].values())[1:]
    broken = {**TIDE, "loss_by_bin": dict(zip(SLOTS, losses, strict=True)), "loss": "Infinity"}
    run = DecileRun.from_record("tide", broken)
    assert math.isnan(run.loss_by_slot["0"] or 0.0)
    made = replace(report(), runs=(run,))
    made.write(tmp_path)
    assert json.loads((tmp_path / "deciles.json").read_text())["rows"][0]["runs"]["tide"]["loss"] == "NaN"
    assert "nan" in made.text()
