"""Making, keeping and reporting sections, with fake diagnostics."""

import html.parser
import weakref
from dataclasses import replace

import pytest

from tide_mega.errors import ConfigError
from tide_mega.lab.figures import make as making
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.make import make
from tide_mega.lab.figures.registry import DIAGNOSTICS, AnalyzeOptions, Diagnostic, chosen
from tide_mega.lab.figures.report import show
from tide_mega.lab.figures.section import DataTable, Section
from tide_mega.lab.plotting import panels
from tide_mega.trained.model import TrainedModel


class Fake(Diagnostic):
    """A diagnostic that counts how often it is made."""

    made = 0

    def load(self):
        def run(analysis):
            Fake.made += 1
            if self.name == "skips":
                raise SkippedError("it needs a run with memory (K > 0)")
            if self.name == "fails":
                raise ZeroDivisionError("planted <b>")
            figure, axes = panels(1)
            axes[0, 0].plot([0, 1])
            labels = ", ".join(run.label for run in analysis.runs)
            table = DataTable.of(["a & b"], [["<i>"], [0.25]])
            return Section("It rises.", (labels,), {"rows": table}, {"f": figure})

        return run


def fake(name):
    return Fake(name, "Figure 0", "A < B", "nothing", "nowhere")


@pytest.fixture
def analysis(tiny_runs, alone, monkeypatch, tmp_path):
    monkeypatch.setattr(Fake, "made", 0)
    monkeypatch.setattr(making, "DIAGNOSTICS", tuple(map(fake, ("works", "skips", "fails", "later"))))
    runs, out = [str(tiny_runs[2]), f"base={tiny_runs[0]}"], tmp_path / "new" / "out"
    return Analysis.open(AnalyzeOptions(run=runs, out=str(out)), alone)


class Outline(html.parser.HTMLParser):
    """Text and sources of a page."""

    def __init__(self):
        super().__init__()
        self.text, self.sources = "", []

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href") and value[0] != "#"]


def page_of(folder):
    outline = Outline()
    outline.feed((folder / "report.html").read_text())
    return outline


def test_runs_are_in_the_order_of_k(analysis):
    assert [(run.label, run.num_blocks) for run in analysis.runs] == [("base", 0), ("k2", 2)]
    assert analysis.base.label == "base"
    assert [run.label for run in analysis.with_memory] == ["k2"]


def test_a_failure_keeps_nothing_else_from_being_made(analysis, caplog):
    failed = make(analysis, list(making.DIAGNOSTICS))
    assert [gone.name for gone in failed] == ["fails"]
    assert "ZeroDivisionError" in caplog.text
    page = page_of(analysis.out)
    assert "A < B" in page.text and "base, k2" in page.text
    assert "skips (Figure 0): it needs a run with memory (K > 0)" in page.text
    assert "fails (Figure 0): failed: ZeroDivisionError: planted <b>" in page.text


def test_a_report_says_why_nothing_is_shown(analysis):
    assert make(analysis, [fake("skips")]) == []
    assert "skips (Figure 0): it needs a run with memory (K > 0)" in page_of(analysis.out).text


@pytest.mark.parametrize("last", [0, 2])
def test_what_is_made_lies_in_the_folder_of_the_run_given_last(tiny_runs, alone, last):
    runs = [str(tiny_runs[2 - last]), str(tiny_runs[last])]
    assert Analysis.open(AnalyzeOptions(run=runs), alone).out == tiny_runs[last] / "analysis"


def test_the_report_needs_nothing_beside_it(analysis):
    make(analysis, [fake("works")])
    sources = page_of(analysis.out).sources
    assert sources and all(source.startswith("data:image/svg+xml;base64,") for source in sources)


def made_again(analysis, *names):
    before = Fake.made
    make(analysis, [replace(fake(name), options=("sequences", "texts")) for name in names])
    return Fake.made - before


def test_what_is_there_is_kept_until_what_it_depends_on_changes(analysis, tmp_path):
    text = tmp_path / "prose.txt"
    text.write_text("one")
    analysis.options = replace(analysis.options, texts=[str(text)])
    assert made_again(analysis, "works", "later") == 2
    assert made_again(analysis, "works", "later") == 0
    analysis.options = replace(analysis.options, texts=[f"{text.parent}/./{text.name}"])
    assert made_again(analysis, "works") == 0, "the same file, spelled in another way"
    analysis.options = replace(analysis.options, templates=3)
    assert made_again(analysis, "works") == 0, "it does not depend on templates"
    analysis.options = replace(analysis.options, sequences=3)
    assert made_again(analysis, "works") == 1
    text.write_text("two")
    assert made_again(analysis, "works") == 1
    logged = analysis.runs[1].metrics
    kept = logged.read_bytes()
    logged.write_bytes(kept + b"{")  # a run that goes on
    assert made_again(analysis, "works") == 1
    logged.write_bytes(kept)
    analysis.options = replace(analysis.options, fresh=True)
    assert made_again(analysis, "works") == 1


def test_a_section_of_other_sources_is_made_again(analysis, monkeypatch):
    assert made_again(analysis, "works") == 1
    assert made_again(analysis, "works") == 0
    monkeypatch.setattr(making, "_code", lambda: "changed")
    assert made_again(analysis, "works") == 1


def test_a_section_of_other_inputs_is_not_shown_as_current(analysis):
    make(analysis, [fake("works"), fake("later")])
    assert len(page_of(analysis.out).sources) == 2
    analysis.options = replace(analysis.options, seed=1)
    make(analysis, [fake("works")])
    page = page_of(analysis.out)
    assert len(page.sources) == 1
    assert "later (Figure 0): what there is was made with other options" in page.text


def test_a_section_that_fails_now_is_not_shown_as_it_was(analysis, monkeypatch):
    make(analysis, [fake("works")])
    analysis.options = replace(analysis.options, fresh=True)

    def fails(_):
        raise ValueError("planted")

    monkeypatch.setattr(Fake, "load", lambda self: fails)
    make(analysis, [fake("works")])
    page = page_of(analysis.out)
    assert not page.sources and "works (Figure 0): failed: ValueError: planted" in page.text


def test_which_names_diagnostics_in_the_reports_order():
    assert [d.name for d in chosen(["routing", "norms"])] == ["norms", "routing"]
    assert chosen(["all"]) == list(DIAGNOSTICS)
    with pytest.raises(ConfigError, match=r"which=routin is no diagnostic: did you mean routing\?"):
        chosen(["routin"])


def test_two_runs_of_one_label_are_refused(tiny_runs, alone):
    twice = AnalyzeOptions(run=[str(tiny_runs[2]), str(tiny_runs[2])])
    with pytest.raises(ConfigError, match="two runs are called k2"):
        Analysis.open(twice, alone)


def test_one_model_at_a_time_is_open(analysis, monkeypatch):
    base, tide = analysis.runs
    assert analysis.model(base) is analysis.model(base)
    before = weakref.ref(analysis.model(base))
    alive = []

    class Watched(TrainedModel):
        def __init__(self, *args, **kwargs):
            alive.append(before() is not None)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr("tide_mega.lab.figures.analysis.TrainedModel", Watched)
    analysis.model(tide)
    assert alive == [False]


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (2e-7, "2.000e-07"),
        (3.0, "3"),
    ],
)
def test_numbers_are_shown_for_readers(cell, text):
    assert show(cell) == text
