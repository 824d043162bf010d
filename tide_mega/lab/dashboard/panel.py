"""A panel: which metrics it shows, by W&B name, and which of them a given run has."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

AXES = ("step", "tokens")
"""Logged with every record; the x axes of the other metrics."""


@dataclass(frozen=True)
class Panel:
    """A chart of metrics over training tokens."""

    title: str
    unit: str
    """Label of the y axis."""
    lines: tuple[str, ...] = ()
    """The metrics, if their names do not depend on the model."""
    pattern: str = ""
    """Otherwise an anchored regular expression for their names, in the syntax common to Python, Go and JavaScript.
    Its group is a line's label or, with `split`, the value that gets a panel."""
    split: bool = False
    """Whether each value of the group gets its own panel, once the names are known."""
    of: str = ""
    """What a line stands for (decile, layer, …) if the lines are ordered; colours then show the order."""
    log_y: bool = False
    points: bool = False
    """Whether to draw points without connecting lines."""

    def __post_init__(self) -> None:
        if bool(self.lines) == bool(self.pattern):
            raise ValueError(f"panel {self.title!r} needs either lines or a pattern")
        if self.split and re.compile(self.pattern).groups != 1:
            raise ValueError(f"panel {self.title!r} is split, so its pattern needs one group")

    def shows(self, name: str) -> bool:
        """Whether a metric belongs to this panel."""
        return name in self.lines or bool(self.pattern and re.search(self.pattern, name))


@dataclass(frozen=True)
class Section:
    """Panels that belong together, in display order."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Chart:
    """A panel resolved to named metrics."""

    panel: Panel
    title: str
    lines: dict[str, str]
    """Label of every metric, in the order of the legend; never empty."""


def charts(panel: Panel, names: Iterable[str]) -> list[Chart]:
    """Make charts for those of `names` that a panel shows: one, several if it is split, or none."""
    shown = sorted({name for name in names if panel.shows(name)}, key=_natural)
    if not shown:
        return []
    if not panel.pattern:
        labels = _labels(list(panel.lines))
        return [Chart(panel, panel.title, {name: labels[name] for name in panel.lines if name in shown})]
    keys = {name: _key(panel, name) for name in shown}
    if not panel.split:
        return [Chart(panel, panel.title, keys if _differ(keys) else _labels(shown))]
    return [
        Chart(panel, f"{panel.title}: {key}", _labels([name for name in shown if keys[name] == key]))
        for key in sorted(set(keys.values()), key=_natural)
    ]


def _key(panel: Panel, name: str) -> str:
    found = re.search(panel.pattern, name)
    return found[1] if found and found.re.groups and found[1] else name


def _labels(names: list[str]) -> dict[str, str]:
    """Label each by the part after the slash, or by the whole name if that is ambiguous."""
    short = {name: name.rpartition("/")[2] for name in names}
    return short if _differ(short) else {name: name for name in names}


def _differ(labels: dict[str, str]) -> bool:
    return len(set(labels.values())) == len(labels)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part or 0), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
