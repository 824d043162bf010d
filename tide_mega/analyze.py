"""Every figure and table of the paper from trained runs: data, plots and one HTML report.

    python -m tide_mega.analyze run=runs/demo-k0,runs/demo-k4
    python -m tide_mega.analyze run=runs/demo-k4 which=norms,routing
    python -m tide_mega.analyze run=base=runs/a,TIDE=runs/b texts=wikitext2.txt,pubmed.txt out=report

Reads checkpoints of any topology and runs their models in this one process, on a GPU if there is one. Writes a
folder per diagnostic (JSON, CSV, PNG, SVG) and report.html. After an interruption the same command continues.

Diagnostics:
"""

import logging
import sys
from pathlib import Path

from tide_mega.config.command_line import hush_libraries, tool_entry
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.errors import ConfigError
from tide_mega.lab.figures.registry import AnalyzeOptions

log = logging.getLogger("tide_mega.analyze")


def main(arguments: list[str]) -> int:
    """Run the analysis; return the exit status, 1 if a diagnostic failed."""
    hush_libraries()
    options = parse_tool_cli(AnalyzeOptions, arguments, doc=_help())
    # Imported late, so that a wrong key is reported without waiting for megatron-core.
    from tide_mega.run.console import exit_on_run_error, set_up_logging

    set_up_logging()
    with exit_on_run_error():
        return analyze(options)


def analyze(options: AnalyzeOptions) -> int:
    """Make the chosen diagnostics; return the exit status.

    Raises:
        ConfigError: a run, a name or a value cannot be used.
        FolderTakenError: another process is at work in `out`.
    """
    from tide_mega.jobs.lock import FolderLock
    from tide_mega.lab.figures.analysis import Analysis
    from tide_mega.lab.figures.make import REPORT_FILE, make
    from tide_mega.lab.figures.registry import chosen
    from tide_mega.parallel.device import choose_device, set_threads
    from tide_mega.parallel.groups import World, start_distributed, stop_distributed

    _check(options)
    diagnostics = chosen(options.which)
    device = choose_device(options.device, 0)
    set_threads(None, 1)
    analysis = Analysis.open(options, device)
    for run in analysis.runs:
        log.info(
            "%s: K = %d, step %d, %s training tokens", run.label, run.num_blocks, run.step, f"{run.tokens:,}"
        )
    start_distributed(device, World(0, 1, 0, 1), timeout_minutes=60)
    try:
        with FolderLock(analysis.out, "an analysis", key="out"):
            failed = make(analysis, diagnostics)
    finally:
        stop_distributed()
    log.info("written to %s", analysis.out / REPORT_FILE)
    if failed:
        log.error("failed: %s", ", ".join(gone.name for gone in failed))
    return 1 if failed else 0


def _check(options: AnalyzeOptions) -> None:
    if options.precision not in ("fp32", "bf16"):
        raise ConfigError(f"precision={options.precision} does not exist: use fp32 or bf16.")
    for name in ("sequences", "batch", "templates", "decode_tokens"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}={getattr(options, name)} is too small: it must be 1 or more.")
    for text in options.texts:
        if not Path(text).is_file():
            raise ConfigError(f"texts: {text} is not a file.")


def _help() -> str:
    from tide_mega.lab.figures.registry import listing

    return f"{__doc__}{listing()}"


if __name__ == "__main__":
    tool_entry(lambda: main(sys.argv[1:]))
