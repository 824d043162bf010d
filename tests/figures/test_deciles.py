import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tide_mega.lab.figures import deciles
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.lab.figures.section import Section
from tide_mega.lab.plotting import line
from tide_mega.parallel.device import Device


def analysed(device: Device, *runs: object) -> Section:
    return deciles.run(Analysis.open(AnalyzeOptions(run=[str(run) for run in runs]), device))


def column(section: Section, table: str, name: str) -> list[Any]:
    of = section.tables[table]
    return [row[of.columns.index(name)] for row in of.rows]


def edited(folder: Path, to: Path, edit: Callable[[list[dict[str, Any]]], object]) -> Path:
    """Copy a run and change its evaluations."""
    shutil.copytree(folder, to)
    records = [json.loads(line) for line in (to / "metrics.jsonl").read_text().splitlines()]
    edit([record for record in records if record["kind"] == "eval"])
    (to / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return to


def test_real_evaluations_add_up_to_the_overall_loss(tiny_runs: dict[int, Path], alone: Device) -> None:
    section = analysed(alone, f"base={tiny_runs[0]}", f"tide={tiny_runs[2]}")
    assert set(column(section, "sums", "equal")) == {True}
    recorded = column(section, "sums", "recorded loss (nats)")
    for loss, off in zip(recorded, column(section, "sums", "parts minus recorded (nats)"), strict=True):
        assert abs(off) <= 1e-12 * loss
    tokens = column(section, "deciles", "held-out tokens")
    names = column(section, "deciles", "decile")
    of = dict(zip(names, tokens, strict=True))
    assert sum(of[str(i)] for i in range(10)) + of["dropped"] + of["unseen"] == of["all"] > 0
    assert next(sentence for sentence in section.findings if "but for" in sentence).startswith("base:")
    assert any("has the recorded number of tokens in every slot" in sentence for sentence in section.findings)


def test_gains_are_the_baselines_loss_minus_the_runs(tiny_runs: dict[int, Path], alone: Device) -> None:
    section = analysed(alone, f"tide={tiny_runs[2]}", f"base={tiny_runs[0]}")
    base, tide = (column(section, "deciles", f"{name} loss (nats)") for name in ("base", "tide"))
    gains = column(section, "deciles", "tide gain (nats)")
    known = [(b, t, g) for b, t, g in zip(base, tide, gains, strict=True) if g is not None]
    assert known
    assert all(g == pytest.approx(b - t, abs=1e-12) for b, t, g in known)
    assert section.findings[0].startswith("tide gains ")
    assert not any(sentence.startswith("base gains") for sentence in section.findings)
    assert len(section.figures["deciles"].axes) == 2


def test_a_planted_gain_is_what_the_findings_say(
    tiny_runs: dict[int, Path], alone: Device, tmp_path: Path
) -> None:
    def plant(losses: list[float]) -> Callable[[list[dict[str, Any]]], None]:
        def edit(evaluations: list[dict[str, Any]]) -> None:
            last = evaluations[-1]
            last["loss_by_bin"] |= {str(i): loss for i, loss in enumerate(losses)}
            last |= {"rare": losses[0], "common": losses[9]}

        return edit

    before = edited(tiny_runs[0], tmp_path / "a", plant([8.0] * 10))
    after = edited(tiny_runs[2], tmp_path / "b", plant([6.0, 6.5, 7.0, 7.0, 7.0, 7.5, 7.5, 7.5, 7.5, 7.5]))
    section = analysed(alone, f"base={before}", f"tide={after}")
    assert (
        "+2.000 nats (+25.0 %) on the rarest decile, +0.500 nats (+6.2 %) on the commonest"
        in section.findings[0]
    )
    assert "4.0 times as much on rare tokens" in section.findings[0]
    assert "better on 10 of 10 deciles; its gain falls from each decile to the next" in section.findings[1]
    assert any("do NOT add up: all by" in sentence for sentence in section.findings)


def test_the_evaluation_is_that_of_the_checkpoint_looked_at(
    tiny_runs: dict[int, Path], alone: Device
) -> None:
    at = tiny_runs[2] / "checkpoints" / "step-00000003"
    early = column(analysed(alone, f"early={at}"), "deciles", "early loss (nats)")
    late = column(analysed(alone, f"late={tiny_runs[2]}"), "deciles", "late loss (nats)")
    records = [json.loads(line) for line in (tiny_runs[2] / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if record["kind"] == "eval"}
    assert (early[-1], late[-1]) == (losses[3], losses[6])


def test_one_run_alone_has_losses_and_no_gains(tiny_runs: dict[int, Path], alone: Device) -> None:
    section = analysed(alone, tiny_runs[0])
    assert not [name for name in section.tables["deciles"].columns if "gain" in name]
    assert len(section.figures["deciles"].axes) == 1
    assert "nothing to compare with" in section.notes[-1]


def test_a_run_on_other_text_is_left_out(tiny_runs: dict[int, Path], alone: Device, tmp_path: Path) -> None:
    def move(evaluations: list[dict[str, Any]]) -> None:
        evaluations[-1]["count_by_bin"]["9"] += 1

    other = edited(tiny_runs[2], tmp_path / "other", move)
    section = analysed(alone, f"base={tiny_runs[0]}", f"other={other}")
    assert "other is left out: it was not evaluated on the same text as base" in section.notes[0]
    assert not [name for name in section.tables["deciles"].columns if name.startswith("other")]


def test_held_out_text_that_has_changed_is_found(
    tiny_runs: dict[int, Path], alone: Device, tmp_path: Path
) -> None:
    def move(evaluations: list[dict[str, Any]]) -> None:
        evaluations[-1]["count_by_bin"]["9"] += 7

    section = analysed(alone, edited(tiny_runs[0], tmp_path / "run", move))
    assert "are NOT those recorded: 9 " in section.findings[-1]


def test_without_an_evaluation_it_says_what_it_needs(
    tiny_runs: dict[int, Path], alone: Device, tmp_path: Path
) -> None:
    shutil.copytree(tiny_runs[0], tmp_path / "bare")
    (tmp_path / "bare" / "metrics.jsonl").unlink()
    with pytest.raises(SkippedError, match=r"evaluated while it was trained \(trainer\.eval_every\)"):
        analysed(alone, tmp_path / "bare")
    section = analysed(alone, f"bare={tmp_path / 'bare'}", f"tide={tiny_runs[2]}")
    assert section.notes[0] == "bare is left out: it has no evaluation up to step 6."


def test_a_run_that_is_left_out_gives_neither_its_look_nor_its_counts(
    tiny_runs: dict[int, Path], alone: Device, tmp_path: Path
) -> None:
    shutil.copytree(tiny_runs[0], tmp_path / "bare")
    (tmp_path / "bare" / "metrics.jsonl").unlink()
    runs = [f"bare={tmp_path / 'bare'}", f"second={tiny_runs[0]}", f"tide={tiny_runs[2]}"]
    analysis = Analysis.open(AnalyzeOptions(run=runs), alone)
    analysis.runs[0].__dict__["deciles"] = None  # another text's would be as wrong
    section = deciles.run(analysis)
    assert set(column(section, "deciles", "least count in training")) > {None}
    drawn = {of.get_label(): of.get_color() for of in section.figures["deciles"].axes[0].lines}
    assert drawn == {"second": line(0).colour, "tide": line(1).colour}
