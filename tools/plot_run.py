"""Draws what runs logged: the panels of the W&B dashboard, from files, without W&B.

    python tools/plot_run.py run=runs/demo out=plots
    python tools/plot_run.py run=base=runs/demo-k0,runs/demo-k4 out=plots

A run is given as its folder, of which metrics.jsonl is read. `out` receives a PNG and an SVG of each section of
the dashboard, and series.csv: every value logged, under its W&B name. Panels without data are left out.
"""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from tide_mega.config.command_line import status_of, tool_entry
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.errors import DashboardError, printable, refuse
from tide_mega.lab.dashboard.layout import panels_without_data, remarks, summary
from tide_mega.lab.dashboard.plots import save_plots
from tide_mega.lab.dashboard.read import read_run


@dataclass
class Options:
    """What to draw."""

    run: list[str] = MISSING
    """Run folders, each as `path` or `label=path`."""
    out: str = MISSING
    """Folder to write to."""
    x: str = "tokens"
    """What metrics are drawn over: tokens or step."""


def plot(options: Options) -> None:
    """Read, print a line for each run, and draw.

    Raises:
        ConfigError: an option is wrong.
        DashboardError: a run cannot be read, or nothing was logged.
    """
    if options.x not in ("tokens", "step"):
        refuse("x", options.x, "is unknown", "use tokens or step")
    if not options.run:
        refuse("run", "[]", "names no run", "give at least one run folder")
    runs = [read_run(given) for given in options.run]
    labels = [run.label for run in runs]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        refuse(
            "run", ",".join(options.run), f"has two runs called {twice!r}", "name them, as in a=path,b=path"
        )
    for run in runs:
        print(printable(summary(run)))  # a run of someone else has labels of their choosing
        for remark in remarks(run):
            print(f"  note: {printable(remark)}")
    names = [name for run in runs for name in run.names()]
    if not names:
        raise DashboardError("nothing was logged in these runs, so there is nothing to draw.")
    save_plots(runs, Path(options.out), options.x, lambda name: print(f"wrote {options.out}/{name}"))
    if absent := panels_without_data(names):
        print(f"left out, {len(absent)} panels without data: {'; '.join(absent)}")


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status: 0, 1 for a run that cannot be read, 2 for a bad option."""
    options = parse_tool_cli(Options, argv, doc=__doc__ or "")
    return status_of(lambda: plot(options), DashboardError)


if __name__ == "__main__":
    tool_entry(main)
