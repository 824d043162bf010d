"""Which colour and marker a run has: the same as in the figures that draw every run."""

from tide_mega.diagnostics.analysis import Analysis
from tide_mega.plotting.lines import Line, lines


def looks_of(analysis: Analysis) -> dict[str, Line]:
    """Return the look of each run by its label."""
    looks = lines([run.num_blocks for run in analysis.runs])
    return {run.label: look for run, look in zip(analysis.runs, looks, strict=True)}
