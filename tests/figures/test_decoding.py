"""Table 4: turns timed with a fake clock, and the section on tiny trainings; real times are not checked."""

import itertools
import math
import re

import pytest
import torch
from torch.nn.functional import cross_entropy

from tide_mega.hf.rows_tide import RowFormat
from tide_mega.lab.figures import decoding as machine
from tide_mega.lab.figures.analysis import Analysis
from tide_mega.lab.figures.decoding import (
    BURST,
    IN_MEMORY,
    ON_DISK,
    PAPER_MS,
    Contestant,
    Times,
    by_run,
    describe,
    draw,
    machine_of,
    one_thread,
    run,
    take_turns,
)
from tide_mega.lab.figures.kit import as_stored
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.trained.model import TrainedModel


class Clock:
    """Seconds that pass only where a model says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Model:
    """Takes `seconds` for a step; says in a journal what it was asked."""

    def __init__(self, name, seconds, clock, journal):
        self.name, self.seconds, self.clock, self.journal = name, seconds, clock, journal

    def prefill(self, prompts):
        (ids,) = prompts
        self.journal.append((self.name, "reads", list(ids)))
        return torch.zeros(1, 9)

    def step(self, ids_1):
        self.journal.append((self.name, "steps", int(ids_1)))
        self.clock.now += self.seconds() if callable(self.seconds) else self.seconds
        return torch.zeros(1, 9)

    def close(self):
        self.journal.append((self.name, "closes", None))


def contestants_of(clock, journal, **seconds):
    return [
        Contestant(name, k, "", lambda name=name, s=s: Model(name, s, clock, journal))
        for k, (name, s) in enumerate(seconds.items())
    ]


def test_models_decode_bursts_by_turns_in_an_order_that_rotates():
    clock, journal = Clock(), []
    texts = [list(range(100, 148)), list(range(200, 248))]
    times = take_turns(contestants_of(clock, journal, base=0.01, k2=0.011, k8=0.012), texts, 17, clock)
    reads = [(name, ids) for name, what, ids in journal if what == "reads"]
    assert reads == [(name, text[:24]) for text in texts for name in ("base", "k2", "k8")]
    turns = [name for name, what, _ in journal if what == "steps"][::BURST]
    first, second = ["base", "k2", "k8", "k2", "k8", "base"], ["k8", "base", "k2"]
    assert turns == [*first, *second, *first]
    asked = [id for name, what, id in journal if (name, what) == ("k2", "steps")]
    assert asked == [*range(124, 148), *range(224, 240)]
    # The first burst of each text is not counted.
    assert [len(one.by_burst) for one in times] == [3, 3, 3]
    assert [one.median for one in times] == pytest.approx([10, 11, 12])
    assert {name for name, what, _ in journal if what == "closes"} == {"base", "k2", "k8"}


def test_short_texts_make_shorter_bursts():
    times, *_ = take_turns(contestants_of(Clock(), [], base=1.0), [list(range(12))], 10)
    assert len(times.by_burst) == 4 and {len(burst) for burst in times.by_burst} == {3}


def test_what_slows_the_machine_for_a_while_leaves_the_ratio():
    clock = Clock()

    def under_load(seconds):
        return lambda: seconds * (20 if 3 < clock.now < 9 else 1)

    contestants = contestants_of(clock, [], base=under_load(0.1), k2=under_load(0.12))
    base, k2 = take_turns(contestants, [list(range(400))], 160, clock)
    assert k2.ratios(base).median == pytest.approx(1.2)


def test_models_are_closed_where_one_cannot_be_opened():
    journal = []
    contestants = contestants_of(Clock(), journal, base=1.0)

    def fail():
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        take_turns([*contestants, Contestant("k2", 2, "", fail)], [[1] * 8], 4)
    assert journal == [("base", "closes", None)]


def times_of(label, k, place, *turns):
    return Times(label, k, place, turns)


def known():
    base = times_of("base", 0, "", (10.0, 10.0, 10.0), (20.0, 20.0, 20.0))
    tide = times_of("TIDE", 2, IN_MEMORY, (11.0, 11.0, 11.0), (21.0, 21.0, 30.0))
    return base, tide


def test_ratios_are_of_medians_of_bursts():
    base, tide = known()
    assert (base.median, tide.median) == (15.0, 16.0)
    ratios = tide.ratios(base)
    assert (ratios.quarter, ratios.median, ratios.three_quarters) == pytest.approx((1.0625, 1.075, 1.0875))
    said, beside = describe([base, tide], base, "a machine")
    assert said == "On a machine, batch 1: base 15.000 ms; TIDE, rows in memory 16.000 ms a token."
    assert "1.075 times base, half of the turns 1.062 to 1.088; the paper's 1B 1.014 times" in beside
    assert "no run without memory" in describe([tide], None, "a machine")[1]
    row = by_run([base, tide], base).rows[1]
    assert row[:5] == ("TIDE", 2, "rows in memory", 6, 16.0) and row[-1] == pytest.approx(11.236 / 11.085)
    assert by_run([tide], None).rows[0][8:11] == (None, None, None)


def test_the_picture_has_ratios_where_there_is_a_baseline():
    base, tide = known()
    assert len(draw([tide], None, PAPER_MS).axes) == 1
    figure = draw([base, tide], base, PAPER_MS)
    assert figure.axes[1].get_lines()[0].get_ydata() == pytest.approx([1.075])
    figure.savefig("/dev/null", format="png")


def test_a_cpu_decodes_with_one_thread_and_the_others_come_back(alone, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with pytest.raises(KeyError), one_thread(alone):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_a_machine_is_named(alone, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast One\n" * 2)
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "cpuinfo")
    assert machine_of(alone).startswith("Fast One, ")
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "absent")
    assert re.search(r", \d+ threads? of \d+ cores", machine_of(alone))


def test_the_section_times_every_run_and_leaves_no_export(tiny_runs, alone, tmp_path):
    words = [f"k{k}={tiny_runs[k]}" for k in (0, 2)]
    options = AnalyzeOptions(run=words, batch=2, sequences=4, decode_tokens=16, out=str(tmp_path / "out"))
    section = run(Analysis.open(options, alone))
    rows = section.tables["by_run"].rows
    assert [row[:4] for row in rows] == [
        ("k0", 0, "none", 16),
        ("k2", 2, IN_MEMORY, 16),
        ("k2", 2, ON_DISK, 16),
    ]
    assert all(0 < row[5] <= row[4] <= row[6] and math.isfinite(row[8]) for row in rows)
    assert rows[0][8:11] == (1, 1, 1) and set(section.figures) == {"decoding"}
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_decoded_is_the_run_itself_and_in_int4_what_precision_scores(
    tiny_runs, alone, tmp_path, monkeypatch
):
    """Logits of exported folders are those by which the trained model scores the same text."""
    decoded = []

    def look(contestants, texts, tokens):
        for contestant in contestants[1:]:
            decoder = contestant.open()
            decoder.prefill([texts[0][:8]])
            decoded.append([decoder.step(torch.tensor([token]))[0] for token in texts[0][8:]])
            decoder.close()
        return take_turns(contestants, texts, tokens, itertools.count().__next__)

    monkeypatch.setattr("tide_mega.lab.figures.decoding.take_turns", look)
    words = [f"k{k}={tiny_runs[k]}" for k in (0, 2)]
    analysis = Analysis.open(
        AnalyzeOptions(run=words, batch=1, sequences=1, decode_tokens=8, out=str(tmp_path)), alone
    )
    run(analysis)
    (batch,) = analysis.held_out(analysis.runs[1])
    model = TrainedModel(analysis.runs[1], alone)
    trained = model.score([batch])[0].cross_entropy_BT[0, 8:]
    with model.reading(as_stored(model, RowFormat("int4", 2, 32))):
        rounded = model.score([batch])[0].cross_entropy_BT[0, 8:]
    for scored, steps in zip((trained, rounded), decoded, strict=True):
        expected = cross_entropy(torch.stack(steps), batch.labels_BT[0, 8:], reduction="none")
        torch.testing.assert_close(scored, expected, rtol=0, atol=1e-5)
    assert (trained - rounded).abs().max() > 1e-4
