import json
import math

import pytest

from tide_mega.errors import PlaceError
from tide_mega.lab.figures.registry import Diagnostic
from tide_mega.lab.figures.section import DataTable, Section, load, save, to_csv
from tide_mega.lab.plotting import panels

DEMO = Diagnostic("demo", "Figure 0", "A title", "nothing", "nowhere")


def section(value=1.5):
    figure, axes = panels(1)
    axes[0, 0].plot([0, 1], [0, value])
    table = DataTable.of(["decile", "loss (nats)"], [["0", value], ["1", None]])
    return Section("The paper.", ("a finding",), {"rows": table}, {"plot": figure})


def test_what_is_saved_is_read_back(tmp_path):
    saved = save(section(), DEMO, tmp_path / "demo", {"step": 3}, 0.5)
    assert load(tmp_path / "demo", DEMO) == saved
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {
        *("section.json", "rows.csv", "plot.png", "plot.svg"),
    }
    assert (tmp_path / "demo" / "rows.csv").read_text() == "decile,loss (nats)\n0,1.5\n1,\n"


def test_a_section_takes_the_place_of_the_one_before(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "old.csv").write_text("x")
    save(section(), DEMO, tmp_path / "demo", {}, 0.0)
    assert not (tmp_path / "demo" / "old.csv").exists()


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    first, second = (save(section(), DEMO, tmp_path / name, {}, 0.0).folder for name in "ab")
    assert (first / "plot.svg").read_bytes() == (second / "plot.svg").read_bytes()


@pytest.mark.parametrize("gone", ["section.json", "plot.svg", "plot.png"])
def test_a_torn_section_is_none(tmp_path, gone):
    folder = save(section(), DEMO, tmp_path / "demo", {}, 0.0).folder
    (folder / gone).unlink()
    assert load(folder, DEMO) is None


def test_what_a_section_is_called_is_not_its_files_to_say(tmp_path):
    folder = save(section(), DEMO, tmp_path / "demo", {}, 0.0).folder
    content = json.loads((folder / "section.json").read_text())
    assert not {"name", "shows", "title", "of"} & set(content)
    (folder / "section.json").write_text(json.dumps({**content, "title": "<i>planted</i>"}))
    assert load(folder, DEMO) is None


def test_a_folder_that_is_a_link_is_unlinked_and_what_it_leads_to_stays(tmp_path):
    theirs = save(section(), DEMO, tmp_path / "theirs", {}, 0.0).folder
    (tmp_path / "demo").symlink_to(theirs)
    assert load(tmp_path / "demo", DEMO) is None
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}
    assert save(section(2.5), DEMO, tmp_path / "demo", {}, 0.0) == load(tmp_path / "demo", DEMO)
    assert not (tmp_path / "demo").is_symlink()
    assert {path.name: path.read_bytes() for path in theirs.iterdir()} == before


def test_a_folder_of_other_things_is_refused_whole(tmp_path):
    (tmp_path / "demo").mkdir()
    for name in ("old.csv", "thesis.tex"):
        (tmp_path / "demo" / name).write_text("mine")
    with pytest.raises(PlaceError, match=r"demo has thesis\.tex, which no analysis wrote: move it"):
        save(section(), DEMO, tmp_path / "demo", {}, 0.0)
    assert len(list((tmp_path / "demo").iterdir())) == 2


@pytest.mark.parametrize("name", ["section.json", "plot.svg", "plot.png"])
def test_a_file_from_elsewhere_is_not_shown(tmp_path, name):
    folder = save(section(), DEMO, tmp_path / "demo", {}, 0.0).folder
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert load(folder, DEMO) is None


def test_what_is_not_finite_is_text_in_json(tmp_path):
    save(section(math.nan), DEMO, tmp_path / "demo", {}, 0.0)
    content = json.loads((tmp_path / "demo" / "section.json").read_text())
    assert content["tables"]["rows"]["rows"][0] == ["0", "NaN"]


def test_a_table_has_a_cell_for_every_column():
    with pytest.raises(ValueError, match="a row has 1 cells and there are 2 columns"):
        DataTable.of(["a", "b"], [[1]])
    assert to_csv(DataTable.of(["a", "b"], [[True, "x,y"]])) == 'a,b\ntrue,"x,y"\n'
