"""Perplexity of texts and of the held-out split against training tokens (paper, Figure 8)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tide_mega.data.batch import TokenBatch
from tide_mega.data.texts import TextSet, load_texts
from tide_mega.diagnostics.analysis import Analysis
from tide_mega.diagnostics.base_models import caution
from tide_mega.diagnostics.perplexity.curves import Point, TextCurve, join, spread
from tide_mega.diagnostics.perplexity.plot import draw, draw_relative
from tide_mega.diagnostics.perplexity.scores import digest, label_bytes, logged_points, score
from tide_mega.diagnostics.perplexity.words import decile_table, describe, perplexity_table
from tide_mega.diagnostics.section import Section
from tide_mega.trained.run import TrainedRun

MOST_CHECKPOINTS = 8
"""Of each run that are scored."""
HELD_OUT, IN_TRAINING = "held-out split", "held-out split, in training"
PAPER = (
    "On WikiText-2, PubMed and DCLM every TIDE-1B model has a lower perplexity than the baseline throughout 200 "
    "billion tokens, lower with every K from 2 to 24; K = 2 to 4 after 100 billion tokens equals the baseline "
    "after 200 billion."
)


@dataclass
class _Found:
    """Curves by text, and what is to be said of how they came about."""

    by_text: dict[str, list[TextCurve]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, text: str, run: TrainedRun, points: Sequence[Point]) -> None:
        curve = TextCurve(text, run.label, run.num_blocks, tuple(points))
        self.by_text.setdefault(text, []).append(curve)


def run(analysis: Analysis) -> Section:
    """Score the texts with every run's checkpoints, and add what the runs logged; see `Section`.

    Raises:
        ConfigError: a text is not there, or two have the same name.
        DataError: a text or the held-out split cannot be read.
    """
    options = analysis.options
    texts = load_texts(
        options.texts,
        analysis.runs[0].tokenizer,
        max_tokens=options.text_tokens,
        max_document_bytes=options.max_document_bytes,
        key="texts",
        vocab_size=min(one.config.model.vocab_size for one in analysis.runs),
    )
    found = _Found()
    digests = {one.label: _measure(analysis, one, texts, found) for one in analysis.runs}
    if not texts:
        found.notes.append(
            "No text was given: texts=<file>,<file> adds WikiText-2 or others to the held-out split."
        )
    same_split = len(set(digests.values())) == 1
    if not same_split:
        found.notes.append(
            "The runs' held-out splits differ (other data or sequence length), so perplexities on them are not "
            "compared."
        )
    apart = {HELD_OUT, IN_TRAINING} if not same_split else set()
    logged = found.by_text.get(IN_TRAINING, [])
    if any(curve.scored != logged[0].scored for curve in logged):
        apart.add(IN_TRAINING)
        found.notes.append("The runs' evaluations in training scored different tokens and are not compared.")
    found.notes += _differing_settings(analysis.runs)
    names = [*(text.name for text in texts), HELD_OUT, IN_TRAINING]
    by_text = [found.by_text[name] for name in names if name in found.by_text]
    figures = {"perplexity": draw(by_text)}
    relative = draw_relative([curves for curves in by_text if curves[0].text not in apart])
    if relative is not None:
        figures["relative"] = relative
    return Section(
        paper=PAPER,
        findings=tuple(
            sentence
            for curves in by_text
            for sentence in describe(curves, compare=curves[0].text not in apart)
        ),
        tables={"perplexity": perplexity_table(by_text), "by_decile": decile_table(by_text)},
        figures=figures,
        notes=tuple(found.notes),
    )


def _measure(analysis: Analysis, run: TrainedRun, texts: Sequence[TextSet], found: _Found) -> str:
    """Add a run's curves; return what identifies its held-out sequences."""
    options, seq_length = analysis.options, run.config.data.seq_length
    held_out = analysis.held_out(run)
    sets: dict[str, tuple[list[TokenBatch], int]] = {
        text.name: (list(text.batches(seq_length, options.batch)), text.num_bytes) for text in texts
    }
    sets[HELD_OUT] = (held_out, label_bytes(held_out, run.tokenizer))
    history = run.history
    if all(weights.step != run.step for weights in history):  # it lies elsewhere than the others
        history = [*history, run.weights]
    chosen = spread(history, MOST_CHECKPOINTS)
    if len(chosen) < len(history):
        steps = ", ".join(f"{weights.step:,}" for weights in chosen)
        found.notes.append(
            f"{run.label}: {len(chosen)} of {len(history)} checkpoints were scored, those of steps {steps}."
        )
    measured: dict[str, list[Point]] = {name: [] for name in sets}
    for weights in chosen:
        model = analysis.model(run, weights)
        for name, (batches, num_bytes) in sets.items():
            result = score(model, batches, num_bytes)
            measured[name].append(Point(run.tokens_at(weights), weights.step, result, is_logged=False))
        del model  # before the next is built: the analysis holds one at a time
    logged, logged_held_out = logged_points(run.metrics, run.step)
    for name, points in measured.items():
        found.add(name, run, _joined(run, name, points, logged.pop(name, []), found.notes))
    for name, points in logged.items():
        found.notes.append(
            f"{run.label} logged {len(points)} evaluations of {name} in training, which is not among the "
            "texts here."
        )
    if logged_held_out:
        found.add(IN_TRAINING, run, logged_held_out)
    return digest(held_out)


def _joined(
    run: TrainedRun, name: str, measured: Sequence[Point], logged: Sequence[Point], notes: list[str]
) -> Sequence[Point]:
    joined = join(measured, logged)
    if joined.shared:
        notes.append(
            f"{run.label} on {name}: at {joined.shared} checkpoints the loss logged in training and the one "
            f"measured here differ by {joined.largest_difference:.1e} nats at most."
        )
    if joined.left_out:
        notes.append(
            f"{run.label} on {name}: {joined.left_out} evaluations in training scored other tokens of it (see "
            "data.perplexity_tokens and text_tokens) and are left out."
        )
    return joined.points


def _differing_settings(runs: Sequence[TrainedRun]) -> list[str]:
    notes = caution(runs)
    lengths = {run.label: run.config.data.seq_length for run in runs}
    if len(set(lengths.values())) > 1:
        each = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
        notes.append(f"Sequence lengths differ, and with them the context of every token: {each}.")
    # Of the tokenizer's types: `bins` also has the rows that pad a vocabulary.
    if any(not np.array_equal(run.deciles.bin_of_type, runs[0].deciles.bin_of_type) for run in runs):
        notes.append("The runs' frequency deciles differ: rare, mid and common are each run's own.")
    return notes
