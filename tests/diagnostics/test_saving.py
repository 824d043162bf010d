import json
import math

import pytest

from tide_mega.diagnostics.saving import load, save, to_csv
from tide_mega.diagnostics.section import DataTable, Section
from tide_mega.plotting.style import panels


def section(value=1.5):
    figure, axes = panels(1)
    axes[0, 0].plot([0, 1], [0, value])
    table = DataTable.of(["decile", "loss (nats)"], [["0", value], ["1", None]])
    return Section(
        "demo", "Figure 0", "A title", "The paper.", ("a finding",), {"rows": table}, {"plot": figure}
    )


def test_what_is_saved_is_read_back(tmp_path):
    saved = save(section(), tmp_path / "demo", {"step": 3}, 0.5)
    assert load(tmp_path / "demo") == saved
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {
        *("section.json", "rows.csv", "plot.png", "plot.svg"),
    }
    assert (tmp_path / "demo" / "rows.csv").read_text() == "decile,loss (nats)\n0,1.5\n1,\n"


def test_a_section_takes_the_place_of_the_one_before(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "old.csv").write_text("x")
    save(section(), tmp_path / "demo", {}, 0.0)
    assert not (tmp_path / "demo" / "old.csv").exists()


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    first, second = (save(section(), tmp_path / name, {}, 0.0).folder for name in "ab")
    assert (first / "plot.svg").read_bytes() == (second / "plot.svg").read_bytes()


@pytest.mark.parametrize("gone", ["section.json", "plot.svg", "plot.png"])
def test_a_torn_section_is_none(tmp_path, gone):
    folder = save(section(), tmp_path / "demo", {}, 0.0).folder
    (folder / gone).unlink()
    assert load(folder) is None


def test_what_is_not_finite_is_text_in_json(tmp_path):
    save(section(math.nan), tmp_path / "demo", {}, 0.0)
    content = json.loads((tmp_path / "demo" / "section.json").read_text())
    assert content["tables"]["rows"]["rows"][0] == ["0", "nan"]


def test_a_table_has_a_cell_for_every_column():
    with pytest.raises(ValueError, match="a row has 1 cells and there are 2 columns"):
        DataTable.of(["a", "b"], [[1]])
    assert to_csv(DataTable.of(["a", "b"], [[True, "x,y"]])) == 'a,b\ntrue,"x,y"\n'
