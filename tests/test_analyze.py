"""The entry point on tiny trainings, whole."""

import json

import markupsafe
import pytest

from tests.support.package_log import package_log_kept
from tide_mega.analyze import main
from tide_mega.jobs.lock import FolderLock
from tide_mega.lab.figures.registry import DIAGNOSTICS

NAMED = r"TIDE $\frac$ <i>"
"""A name that means something to what draws and to browsers, and is shown as it is typed."""
SMALL = ["sequences=4", "batch=2", "templates=3", "text_tokens=200", "decode_tokens=16", "device=cpu"]


def runs(tiny_runs, *more):
    return [f"run=base={tiny_runs[0]},{NAMED}={tiny_runs[2]}", *SMALL, *more]


@pytest.fixture(scope="module")
def analysed(tiny_runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysed")
    (folder / "prose.txt").write_text("The memory tells every layer which token it reads. " * 40)
    with package_log_kept():
        assert main(runs(tiny_runs, f"out={folder / 'out'}", f"texts={folder / 'prose.txt'}")) == 0
    return folder / "out"


@pytest.mark.slow
def test_every_diagnostic_has_data_figures_and_a_place_in_the_report(analysed):
    page = (analysed / "report.html").read_text()
    for diagnostic in DIAGNOSTICS:
        if diagnostic.name == "zero_shot":
            continue
        section = json.loads((analysed / diagnostic.name / "section.json").read_text())
        assert section["findings"] and section["tables"] and section["figures"], diagnostic.name
        assert f'<section id="{diagnostic.name}"><h2>{markupsafe.escape(diagnostic.title)}<small>' in page
        for name, table in section["tables"].items():
            lines = (analysed / diagnostic.name / f"{name}.csv").read_text().splitlines()
            assert len(lines) > len(table["rows"]) > 0, (diagnostic.name, name)
    assert "zero_shot (Table 2): it needs" in page
    assert page.count("data:image/") == len(list(analysed.glob("*/*.svg")))


def test_a_baseline_alone_has_what_needs_no_memory(tiny_runs, tmp_path):
    assert main([f"run={tiny_runs[0]}", *SMALL, f"out={tmp_path}", "which=norms,deciles,routing"]) == 0
    assert {path.parent.name for path in tmp_path.glob("*/section.json")} == {"norms", "deciles"}
    assert (
        "routing (Figure 10): it needs a run with memory (K &gt; 0)" in (tmp_path / "report.html").read_text()
    )


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("which=nroms", "did you mean norms?"),
        ("precision=fp16", "precision=fp16 does not exist"),
        ("sequences=0", "sequences=0 is too small"),
        ("decode_tokens=0", "decode_tokens=0 is too small"),
        ("texts=absent.txt", "texts: absent.txt is not a file"),
        ("data=nowhere", "say where it lies with data=<folder>"),
    ],
)
def test_a_mistake_is_a_sentence_and_status_2(tiny_runs, capsys, word, sentence):
    with pytest.raises(SystemExit) as leaving:
        main(runs(tiny_runs, word))
    assert leaving.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_folder_that_another_analysis_writes_is_refused_untouched(tiny_runs, tmp_path, capsys):
    with FolderLock(tmp_path, "an analysis", key="out"):
        with pytest.raises(SystemExit) as leaving:
            main(runs(tiny_runs, f"out={tmp_path}"))
        assert [path.name for path in tmp_path.iterdir()] == ["in_use.json"]
    assert leaving.value.code == 7
    assert f"{tmp_path} is in use by an analysis (process " in capsys.readouterr().err


def test_help_lists_the_diagnostics(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    assert all(diagnostic.name in out and diagnostic.shows in out for diagnostic in DIAGNOSTICS)
