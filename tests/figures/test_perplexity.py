import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.support.runs import tiny, train_here
from tests.support.trained import reference_of
from tide_mega.data.loader import TokenBatch
from tide_mega.data.texts import TextSet
from tide_mega.errors import ConfigError
from tide_mega.lab.figures import perplexity
from tide_mega.lab.figures.analysis import Analysis
from tide_mega.lab.figures.perplexity import describe, draw, draw_relative
from tide_mega.lab.figures.perplexity_curves import (
    Point,
    TextCurve,
    join,
    label_bytes,
    logged_points,
    reaches,
    relative_to,
    spread,
)
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.metrics.deciles import SLOTS
from tide_mega.metrics.records import TextResult, perplexity_of


def point(tokens: int, ppl: float, *, logged: bool = False, scored: int = 10) -> Point:
    loss = math.log(ppl)
    counts = {**dict.fromkeys(SLOTS, 0), "0": 1, "9": scored - 1}
    by_bin = {slot: loss if counts[slot] else None for slot in SLOTS}
    result = TextResult(loss, ppl, loss / 3, scored, loss + 1, None, loss - 0.1, by_bin, counts)
    return Point(tokens, tokens // 10, result, logged)


def curve(label: str, k: int, *points: tuple[int, float], text: str = "wiki") -> TextCurve:
    return TextCurve(text, label, k, tuple(point(*each) for each in points))


def test_a_selection_is_even_with_both_ends() -> None:
    assert spread([1, 2, 3], 8) == [1, 2, 3]
    assert spread(list(range(15)), 8) == [0, 2, 4, 6, 8, 10, 12, 14]
    for length in range(9, 60):
        chosen = spread(list(range(length)), 8)
        assert len(set(chosen)) == 8
        assert (chosen[0], chosen[-1]) == (0, length - 1)
        gaps = {after - before for before, after in pairwise(chosen)}
        assert max(gaps) - min(gaps) <= 1


def test_tokens_to_a_perplexity_are_interpolated_in_the_loss() -> None:
    falling = [point(100, math.e**5), point(200, math.e**3), point(400, math.e**2)]
    assert reaches(falling, math.e**4) == pytest.approx(150)
    assert reaches(falling, math.e**2.25) == pytest.approx(350)
    assert reaches(falling, falling[2].result.perplexity) == pytest.approx(400)
    assert reaches(falling, 200.0) == 100
    assert reaches(falling, 7.0) is None
    assert reaches([], 7.0) is None
    # The first time counts, not a later rise; a diverged first point reaches nothing.
    assert reaches([point(1, 9.0), point(2, 4.0), point(3, 8.0), point(4, 3.0)], 5.0) < 2
    diverged = replace(falling[0], result=replace(falling[0].result, loss=math.nan, perplexity=math.nan))
    assert reaches([diverged, falling[2]], 7.0) is None


def test_logged_points_come_between_measured_ones_of_the_same_tokens() -> None:
    measured = [point(100, 50.0), point(300, 20.0)]
    logged = [point(200, 30.0, logged=True), point(300, 20.2, logged=True)]
    other_part = point(250, 1.0, logged=True, scored=11)
    joined = join(measured, [*logged, other_part])
    assert [p.tokens for p in joined.points] == [100, 200, 300]
    assert [p.is_logged for p in joined.points] == [False, True, False]
    assert joined.shared == 1
    assert joined.largest_difference == pytest.approx(math.log(20.2 / 20))
    assert joined.left_out == 1


def test_findings_give_ends_and_when_the_baseline_is_caught_up_with() -> None:
    base = curve("base", 0, (1_000, 400.0), (2_000, 100.0))
    k2 = curve("k2", 2, (1_000, 200.0), (2_000, 50.0))
    k8 = curve("k8", 8, (1_000, 90.0), (2_000, 60.0))
    late = curve("late", 24, (1_000, 300.0), (2_000, 110.0))
    ends, when = describe([base, k2, k8, late])
    assert "base (K = 0) 100.00 after 2,000 tokens; k2 (K = 2) 50.00" in ends
    assert "50.0 % lower than base (loss -0.693 nats: rare -0.693, common -0.693)" in ends
    assert "late (K = 24) 110.00 after 2,000 tokens, 10.0 % higher than base" in ends
    assert ends.endswith("; it falls at 1 of 3 steps to a larger K.")
    assert when == (
        "base's last perplexity on wiki takes it 2,000 training tokens: k2 needs 1,500 (75 % of these); "
        "k8 needs 1,000 at most, its first point (50 % of these); late does not reach it within 2,000."
    )
    assert describe([base, k2, replace(k8, num_blocks=4, points=curve("", 4, (2_000, 49.0)).points)])[
        0
    ].endswith("; it falls with every larger K.")


def test_runs_that_cannot_be_compared_are_only_listed() -> None:
    base, k2 = curve("base", 0, (1, 400.0)), curve("k2", 2, (1, 200.0))
    (only,) = describe([base, k2], compare=False)
    assert "lower" not in only
    assert describe([k2]) == ["Last perplexity on wiki: k2 (K = 2) 200.00 after 1 tokens."]


def test_every_text_has_a_panel_and_every_run_a_line() -> None:
    runs = [("base", 0), ("k2", 2), ("k8", 8), ("k24", 24)]
    for number in range(1, 6):
        texts = [f"text {i}" for i in range(number)]
        figure = draw(
            [
                [curve(label, k, (10**9, 900.0 - k), (2 * 10**9, 30.0), text=text) for label, k in runs]
                for text in texts
            ]
        )
        assert len(figure.axes) == number
        for axis, text in zip(figure.axes, texts, strict=True):
            assert axis.get_title() == f"{text} (10 tokens)"
            assert [x.get_label() for x in axis.lines if len(x.get_xdata()) and x.get_linestyle() != ":"] == [
                label for label, _ in runs
            ]
            assert axis.get_xlabel() == "training tokens (billions)"
            assert axis.get_yscale() == "log"


def test_perplexities_relative_to_the_baseline_are_drawn_where_it_has_points() -> None:
    base = curve("base", 0, (100, math.e**5), (300, math.e**3))
    other = curve("k2", 2, (50, 9.0), (200, math.e**3.5), (300, math.e**3), (400, 2.0))
    points = relative_to(other, base)
    assert [tokens for tokens, _ in points] == [200, 300]
    assert [percent for _, percent in points] == pytest.approx([100 * (math.exp(-0.5) - 1), 0], abs=1e-9)
    figure = draw_relative([[base, other], [replace(base, text="alone")]])
    assert figure is not None
    (axis,) = figure.axes
    of_run = next(drawn for drawn in axis.lines if drawn.get_label() == "k2")
    assert list(of_run.get_ydata()) == pytest.approx([percent for _, percent in points])
    assert draw_relative([[base], [other]]) is None
    assert draw_relative([]) is None


def test_a_diverged_point_is_not_drawn() -> None:
    points = (*curve("", 0, (100, 50.0)).points, point(200, math.inf))
    (line,) = draw([[TextCurve("wiki", "base", 0, points)]]).axes[0].lines
    assert list(line.get_xdata()) == [100]


def test_logged_evaluations_are_read_by_text_and_step(tmp_path: Path) -> None:
    result = {**vars(point(1, 8.0).result)}
    held_out = {key: result[key] for key in ("loss", "rare", "mid", "common", "loss_by_bin", "count_by_bin")}
    records = [
        {"kind": "train", "step": 1, "tokens": 10, "loss": 9.0},
        {"kind": "eval", "step": 2, "tokens": 20, **held_out},  # of a version without texts
        {"kind": "eval", "step": 4, "tokens": 40, **held_out, "loss": 5.0, "texts": {"wiki": result}},
        {"kind": "eval", "step": 4, "tokens": 40, **held_out, "loss": 2.0, "texts": {"wiki": result}},
        {"kind": "eval", "step": 6, "tokens": 60, **held_out, "texts": {"wiki": result}},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    texts, split = logged_points(path, until=5)
    assert [(p.tokens, p.result.loss, p.is_logged) for p in split] == [
        (20, math.log(8), True),
        (40, 2.0, True),
    ]
    assert split[1].result.perplexity == pytest.approx(math.e**2)
    assert {name: [p.step for p in points] for name, points in texts.items()} == {"wiki": [4]}
    assert texts["wiki"][0].result == TextResult(**result)
    assert logged_points(tmp_path / "absent", until=5) == ({}, [])


class Spelling:
    """Token v spells v bytes."""

    special_ids = frozenset({9})

    def token_bytes(self, token_id: int) -> bytes:
        return b"x" * token_id


def test_bytes_of_labels_leave_padding_and_special_tokens_out() -> None:
    labels_BT = torch.tensor([[3, 3, 9, -1], [1, 0, -1, -1]])
    batches = [TokenBatch(torch.zeros_like(labels_BT), labels_BT)] * 2
    assert label_bytes(batches, Spelling()) == 14  # type: ignore[arg-type]


TOKENS = 200


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "python.txt"
    source = Path(json.__file__).read_text(encoding="utf-8")
    path.write_text(source, encoding="utf-8")
    return path


def analyse(tiny_runs, device, *texts, which=(0, 2)):
    runs = [str(tiny_runs[k]) for k in which]
    options = AnalyzeOptions(
        run=runs, texts=[str(path) for path in texts], text_tokens=TOKENS, sequences=6, batch=2
    )
    return Analysis.open(options, device)


def test_a_trained_runs_perplexity_is_the_reference_models(tiny_runs, alone, text):
    analysis = analyse(tiny_runs, alone, text)
    section = perplexity.run(analysis)
    table = section.tables["perplexity"]
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    texts = ["python", perplexity.HELD_OUT, perplexity.IN_TRAINING]
    assert [(r["text"], r["run"], r["step"]) for r in rows] == [
        (name, run, step) for name in texts for run in ("k0", "k2") for step in (3, 6)
    ]
    assert all(row["training tokens"] == row["step"] * 8 * 32 for row in rows)
    for run in analysis.runs:
        reference = reference_of(run)
        whole = TextSet.load(text, run.tokenizer, max_tokens=TOKENS)
        losses = []
        for first in range(0, whole.num_scored, 32):
            window = torch.from_numpy(whole.ids_N[first : first + 33])
            with torch.no_grad():
                losses.append(reference(window[None, :-1], window[None, 1:]).cross_entropy_BT.double())
        total = torch.cat(losses, 1).sum().item()
        row = next(r for r in rows if (r["text"], r["run"], r["step"]) == ("python", run.label, 6))
        assert row["scored tokens"] == TOKENS - 1
        assert row["perplexity"] == pytest.approx(perplexity_of(total / (TOKENS - 1)), rel=1e-5)
        assert row["bits per byte"] == pytest.approx(total / math.log(2) / whole.num_bytes, rel=1e-5)
    by_decile = section.tables["by_decile"]
    of_text = [row for row in by_decile.rows if row[:2] == ("python", "k2")]
    assert sum(row[4] for row in of_text) == TOKENS - 1
    assert [len(figure.axes) for figure in section.figures.values()] == [3, 3]
    assert any(
        "k0's last perplexity on python takes it 1,536 training tokens: k2 " in f for f in section.findings
    )


def test_without_texts_the_held_out_split_is_measured_and_a_note_says_so(tiny_runs, alone):
    section = perplexity.run(analyse(tiny_runs, alone, which=(2,)))
    assert {row[0] for row in section.tables["perplexity"].rows} == {
        perplexity.HELD_OUT,
        perplexity.IN_TRAINING,
    }
    assert any("No text was given" in note for note in section.notes)


def test_a_long_history_is_thinned_and_said(tiny_runs, alone, text, monkeypatch):
    analysis = analyse(tiny_runs, alone, text, which=(0,))
    monkeypatch.setattr(perplexity, "MOST_CHECKPOINTS", 2)
    (run,) = analysis.runs
    run.__dict__["history"] = [run.history[0], *run.history]
    section = perplexity.run(analysis)
    assert "k0: 2 of 3 checkpoints were scored, those of steps 3, 6." in section.notes


@pytest.fixture(scope="module")
def wide(pools, tiny_data, tmp_path_factory):
    """A run with a layer more and a vocabulary padded further than the other runs'."""
    root = tmp_path_factory.mktemp("wide")
    words = ["model.num_layers=3", "model.vocab_size=704", "run.name=wide"]
    pools(1).run(train_here, tiny(tiny_data, root, *words))
    return root / "wide"


def test_another_base_model_is_cautioned_and_a_padded_vocabulary_has_the_same_deciles(tiny_runs, wide, alone):
    options = AnalyzeOptions(run=[str(tiny_runs[0]), str(wide)], sequences=2, batch=2)
    notes = perplexity.run(Analysis.open(options, alone)).notes
    assert not any("frequency deciles differ" in note for note in notes)
    (caution,) = [note for note in notes if "CAUTION" in note]
    assert caution.endswith("memory: wide has num_layers 3 instead of 2, vocab_size 704 instead of 640.")


def test_other_deciles_are_said(tiny_runs, alone):
    analysis = analyse(tiny_runs, alone)
    other = "The runs' frequency deciles differ: rare, mid and common are each run's own."
    assert other not in perplexity.run(analysis).notes
    last = analysis.runs[1]
    last.__dict__["deciles"] = replace(last.deciles, bin_of_type=last.deciles.bin_of_type[::-1].copy())
    assert other in perplexity.run(analysis).notes


def test_two_texts_of_one_name_are_refused(tiny_runs, alone, text, tmp_path):
    twin = tmp_path / "python.txt"
    twin.write_text("another text", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"texts has two files called python"):
        perplexity.run(analyse(tiny_runs, alone, text, twin))
