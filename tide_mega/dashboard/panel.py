"""A panel: which metrics it shows, by W&B name, and which of them a given run has."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

AXES = ("step", "tokens")
"""Logged with every record; what the other metrics are drawn over."""


@dataclass(frozen=True)
class Panel:
    """A chart of metrics over training tokens."""

    title: str
    unit: str
    """Label of the y axis."""
    lines: tuple[str, ...] = ()
    """The metrics, where their names do not depend on the model."""
    pattern: str = ""
    """Else a regular expression that their names match, anchored, in the syntax that Python, Go and JavaScript
    share. Its group is a line's label, or with `split` what makes a panel of its own."""
    split: bool = False
    """Whether each value of the group gets a panel, as soon as the names are known."""
    of: str = ""
    """What a line stands for (decile, layer, …) where the lines have an order, which their colours then show."""
    log_y: bool = False
    points: bool = False
    """Whether values stand by themselves, without a line from one to the next."""

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
    """Panels that belong together, in the order they are shown in."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Chart:
    """A panel for metrics that are known by name."""

    panel: Panel
    title: str
    lines: dict[str, str]
    """Label of every metric, in the order of the legend; never empty."""


def charts(panel: Panel, names: Iterable[str]) -> list[Chart]:
    """Make charts of those of `names` that a panel shows: one, several where it is split, or none."""
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
    """The part behind the slash, or all of it where that does not tell the lines apart."""
    short = {name: name.rpartition("/")[2] for name in names}
    return short if _differ(short) else {name: name for name in names}


def _differ(labels: dict[str, str]) -> bool:
    return len(set(labels.values())) == len(labels)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part or 0), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
