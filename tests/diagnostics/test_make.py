"""Making, keeping and reporting sections, with made-up diagnostics."""

import html.parser
from dataclasses import replace

import pytest

from tide_mega.config.errors import ConfigError
from tide_mega.diagnostics import make as making
from tide_mega.diagnostics.analysis import Analysis, SkippedError
from tide_mega.diagnostics.make import make
from tide_mega.diagnostics.options import AnalyzeOptions
from tide_mega.diagnostics.registry import DIAGNOSTICS, Diagnostic, chosen
from tide_mega.diagnostics.report import show
from tide_mega.diagnostics.section import DataTable, Section
from tide_mega.plotting.style import panels


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
            return Section(
                self.name, self.shows, "A < B", "It rises.", (labels,), {"rows": table}, {"f": figure}
            )

        return run


def fake(name):
    return Fake(name, "Figure 0", "nothing", "nowhere")


@pytest.fixture
def analysis(tiny_runs, alone, monkeypatch):
    monkeypatch.setattr(Fake, "made", 0)
    monkeypatch.setattr(making, "DIAGNOSTICS", tuple(map(fake, ("works", "skips", "fails", "later"))))
    return Analysis.open(AnalyzeOptions(run=[str(tiny_runs[2]), f"base={tiny_runs[0]}"]), alone)


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


def test_a_failure_keeps_nothing_else_from_being_made(analysis, tmp_path, caplog):
    failed = make(analysis, list(making.DIAGNOSTICS), tmp_path)
    assert [gone.name for gone in failed] == ["fails"]
    assert "ZeroDivisionError" in caplog.text
    page = page_of(tmp_path)
    assert "A < B" in page.text and "base, k2" in page.text
    assert "skips (Figure 0): it needs a run with memory (K > 0)" in page.text
    assert "fails (Figure 0): failed: ZeroDivisionError: planted <b>" in page.text


def test_the_report_needs_nothing_beside_it(analysis, tmp_path):
    make(analysis, [fake("works")], tmp_path)
    sources = page_of(tmp_path).sources
    assert sources and all(source.startswith("data:image/svg+xml;base64,") for source in sources)


def test_what_is_there_is_kept_until_something_changes(analysis, tmp_path):
    make(analysis, [fake("works")], tmp_path)
    make(analysis, [fake("works"), fake("later")], tmp_path)
    assert Fake.made == 2
    analysis.options = replace(analysis.options, sequences=3)
    make(analysis, [fake("works")], tmp_path)
    assert Fake.made == 3
    assert page_of(tmp_path).sources == page_of(tmp_path).sources[:1], "later was of other options"
    analysis.options = replace(analysis.options, fresh=True)
    make(analysis, [fake("works")], tmp_path)
    assert Fake.made == 4


def test_which_names_diagnostics_in_the_reports_order():
    assert [d.name for d in chosen(["routing", "norms"])] == ["norms", "routing"]
    assert chosen(["all"]) == list(DIAGNOSTICS)
    with pytest.raises(ConfigError, match=r"which=routin is no diagnostic: did you mean routing\?"):
        chosen(["routin"])


def test_two_runs_of_one_label_are_refused(tiny_runs, alone):
    twice = AnalyzeOptions(run=[str(tiny_runs[2]), str(tiny_runs[2])])
    with pytest.raises(ConfigError, match="two runs are called k2"):
        Analysis.open(twice, alone)


def test_one_model_at_a_time_is_open(analysis):
    base, tide = analysis.runs
    first = analysis.model(base)
    assert analysis.model(base) is first
    assert analysis.model(tide) is not first
    assert analysis.model(base) is not first


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
