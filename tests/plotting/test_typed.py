"""Names in figures are shown as they are typed; numbers on axes stay matplotlib's."""

import ast
import io
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tests.zero_shot.test_compare import ARC, LAMBADA, result
from tide_mega.lab.dashboard.history import Row, RunHistory
from tide_mega.lab.dashboard.layout import LOSS
from tide_mega.lab.dashboard.plots import draw as draw_dashboard
from tide_mega.lab.figures.distances import draw_heat_map
from tide_mega.lab.figures.neighbours import draw_overlaps
from tide_mega.lab.figures.separation import Separation, draw_heat, draw_lines
from tide_mega.lab.plotting import label, lines, panels
from tide_mega.lab.zero_shot.compare import compare
from tide_mega.lab.zero_shot.output import draw as draw_comparison

SOURCES = Path(__file__).parents[2] / "tide_mega"
NAMES = (r"lr=$3e-4$ cost$", r"$\frac$", r"a\$b$c")
"""Mathematics that matplotlib would set, and such that it would refuse to."""


def shown(figure: Figure) -> list[str]:
    """Every text of the drawing, as a reader sees it."""
    drawing = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(drawing, format="svg")
    root = ElementTree.fromstring(drawing.getvalue())
    texts = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    return [re.sub(r"\n\s*", "", text) for text in texts]  # mathematics is laid out over lines


def everywhere(name: str) -> Figure:
    figure, axes = panels(2)
    first, second = axes.flat
    label(first, f"{name} title", f"{name} x", f"{name} y")
    bars = first.bar([0, 1], [1, 2], label=f"{name} bars")
    first.bar_label(bars, [f"{name} bar", "b"])
    first.set_xticks([0, 1], [f"{name} tick", "b"])
    first.set_yticks([0.9], [f"{name} minor"], minor=True)
    first.legend(title=f"{name} legend title")
    first.set_xlim(-0.6, 1.6)
    second.annotate(f"{name} note", (0.5, 0.5))
    second.text(0.1, 0.1, f"{name} text")
    image = second.imshow([[0.0, 1.0]])
    second.set_yticks([0], [f"{name} row"])
    figure.colorbar(image, ax=second).set_label(f"{name} colours")
    figure.suptitle(f"{name} head")
    figure.legend(handles=[Patch(label=f"{name} patch")], loc="outside lower center")
    return figure


PLACES = (
    *("title", "x", "y", "bars", "bar", "tick", "minor", "legend title"),
    *("note", "text", "row", "colours", "head", "patch"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_typed_wherever_it_stands(name: str) -> None:
    figure = everywhere(name)
    for _ in range(2):  # ticks are made anew between drawings
        assert {f"{name} {place}" for place in PLACES} <= set(shown(figure))


def test_control_characters_are_escaped_where_a_drawing_could_not_hold_them() -> None:
    texts = shown(everywhere("a\x07\ud800"))
    assert {rf"a\x07\ud800 {place}" for place in PLACES} <= set(texts)


def test_powers_of_ten_and_line_breaks_stay() -> None:
    figure, axes = panels(1)
    axes[0, 0].plot([1, 2], [1e-2, 1e4])
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_xticks([1, 2], ["one\nrarest", "$2$"])
    texts = shown(figure)
    powers = {text for text in texts if text.startswith("10")}
    assert {"103", "10\N{MINUS SIGN}2"} <= powers, "mathematics"
    assert {"one", "rarest", "$2$"} <= set(texts)
    assert not any("mathdefault" in text for text in texts)


def separation(layers: int = 3) -> Separation:
    values = np.linspace(0.5, 1.0, layers)
    return Separation(np.vstack([values, values]), 3 * values, 2)


def figures(name: str) -> dict[str, Figure | None]:
    rows: list[Row] = [
        {"step": s, "tokens": 9 * s, "train/loss": 9.0 / s, f"perplexity/{name}": 3.0} for s in (1, 2)
    ]
    runs = [RunHistory(name, "x", rows), RunHistory("other", "x", rows)]
    tasks = [result(name, ARC, "other"), result("lambada_openai", LAMBADA, "other")]
    measured = {name: {name: separation()}, "other": {name: separation()}}
    looks = dict(zip(measured, lines([0, 2]), strict=True))
    return {
        "dashboard": draw_dashboard(LOSS, runs),
        "dashboard of one": draw_dashboard(LOSS, runs[:1]),
        "runs": draw_comparison(compare([tasks], [name], {}, "acc_norm")),
        "tasks": draw_comparison(compare([tasks], ["other"], {}, "acc_norm")),
        "distances": draw_heat_map(name, np.full((3, 3), 0.5)),
        "neighbours": draw_overlaps(name, 5, {"rare": [[0.1, 0.2], [0.3]]}),
        "separation": draw_lines(measured, looks, name, relative=False),
        "pairs": draw_heat(measured, {name: [name, "b"]}, "other"),
    }


def test_figures_of_runs_tasks_and_pairs_show_names_as_typed() -> None:
    name = NAMES[0]
    for which, figure in figures(name).items():
        assert figure is not None, which
        assert any(name in text for text in shown(figure)), which


def test_tables_are_named_with_an_index() -> None:
    assert {"E", "E₁", "E₂"} <= set(shown(draw_heat_map("run", np.full((3, 3), 0.5))))


def test_there_is_no_other_way_to_a_figure() -> None:
    """Figures come from `tide_mega.lab.plotting` alone, which shows text as typed and sets no mathematics."""
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Figure":
                pytest.fail(f"{path} makes a figure of its own")
            if isinstance(node, ast.ImportFrom | ast.Import):
                assert all("pyplot" not in alias.name for alias in node.names), path
