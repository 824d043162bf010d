"""Figure 4: sizes known by hand, files as long as computed, and the section on tiny trainings."""

import pytest

from tide_mega.config.hydra_door import compose
from tide_mega.hf.rows_tide import KINDS
from tide_mega.lab.figures import storage as report
from tide_mega.lab.figures.analysis import Analysis
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.lab.figures.storage import BLOCKS, PAPER_1B, all_sizes, describe, draw, run, sizes_of


def test_the_papers_1b_is_the_presets():
    assert compose(["experiment=base_1b"], validate=False).model == PAPER_1B


def test_the_papers_figures_are_elements_alone():
    base, most = sizes_of(PAPER_1B, 0, "int4"), sizes_of(PAPER_1B, 24, "int4")
    assert base.weights == pytest.approx(1.03e9, rel=0.02) and base.file == base.cache == base.codes == 0
    assert most.codes == 128_256 * 24 * 2048 // 2 == pytest.approx(3.152e9, rel=1e-4)
    assert most.weights - base.weights == 24 * 25 * 2048  # routers alone


def test_a_record_has_scales_and_a_file_its_pages_and_checksums():
    of = sizes_of(PAPER_1B, 8, "int4")
    assert of.record == 8 * 2048 // 2 + 8 * 2048 // 32 * 2 == 9216
    assert of.rows == 128_256 * 9216
    # Four records of 9,216 bytes fill nine pages; a page of header before, whole pages of checksums behind.
    assert of.file == 4096 + 128_256 // 4 * 36_864 + -(-4 * 128_256 // 4096) * 4096
    assert of.cache == 6413 * 9216 + 4 * 128_256


def test_a_rank_keeps_its_basis_in_memory_and_in_the_file():
    of = sizes_of(PAPER_1B, 2, "rank")
    basis = 2 * 2048 * 4096
    assert (of.record, of.codes) == (4096, 0)
    assert of.cache == 6413 * 4096 + 4 * 128_256 + basis
    assert of.file == 4096 * (1 + 128_256 + 126) + basis


def test_every_k_and_format_is_there_once():
    sizes = all_sizes(PAPER_1B)
    assert [(of.num_blocks, of.kind) for of in sizes] == [
        (0, None),
        *((k, kind) for k in BLOCKS[1:] for kind in KINDS),
    ]


def test_what_is_said_of_the_largest_k():
    memory, disk = describe("1B", all_sizes(PAPER_1B))
    assert "1.043 GB at K = 0 and 1.044 GB at K = 24 (+0.12 %)" in memory
    assert "int4's elements alone, as the paper counts, 3.152 GB" in disk


def analysis_of(tiny_runs, device, *ks):
    words = [f"k{k}={tiny_runs[k]}" for k in ks]
    return Analysis.open(AnalyzeOptions(run=words), device)


def test_files_written_for_a_run_are_as_long_as_computed(tiny_runs, alone, monkeypatch):
    section = run(analysis_of(tiny_runs, alone, 0, 2))
    files = section.tables["files"].rows
    assert [row[:2] for row in files] == [("k2", kind) for kind in KINDS]
    assert all(computed == found > 0 for *_, computed, found in files)
    assert "The 6 files written of the rows of k2 are as long as computed, to the byte." in section.findings
    names = {row[0] for row in section.tables["bytes"].rows}
    assert names == {"shape of k0", "paper's 1B"} and set(section.figures) == {"bytes_1", "bytes_2"}

    monkeypatch.setattr(report, "MOST_ELEMENTS", 640 * 2 * 32 - 1)
    section = run(analysis_of(tiny_runs, alone, 2))
    assert set(section.tables) == {"bytes"}
    assert "no files were written to compare, since its tables have 40,960 elements" in section.notes[-1]


def test_a_file_of_another_length_is_named(tiny_runs, alone, monkeypatch):
    of = report.Written("k2", "int4", 100, 104)
    monkeypatch.setattr(report, "write_all", lambda _: [of])
    findings = run(analysis_of(tiny_runs, alone, 2)).findings
    assert findings[-1] == "k2: the file in int4 has 104 bytes, and 100 were computed."


def test_bars_are_weights_with_the_cache_above_them():
    sizes = all_sizes(PAPER_1B)
    figure = draw("1B", sizes, (1.03e9, 3.152e9))
    weights, caches = figure.axes[0].containers
    shown = [of for of in sizes if of.kind in (None, "int4")]
    assert [bar.get_height() for bar in weights] == [of.weights / 1e9 for of in shown]
    assert [bar.get_y() for bar in caches] == [of.weights / 1e9 for of in shown]
    assert "GB" in figure.axes[1].get_ylabel()
    figure.savefig("/dev/null", format="png")
