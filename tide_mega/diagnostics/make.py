"""Make the chosen diagnostics one after the other, keep what is there already, write the report."""

import hashlib
import logging
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tide_mega
from tide_mega.diagnostics.analysis import Analysis, SkippedError
from tide_mega.diagnostics.registry import DIAGNOSTICS, Diagnostic
from tide_mega.diagnostics.report import Missing, write_report
from tide_mega.diagnostics.saving import SavedSection, load, save
from tide_mega.trained.run import TrainedRun

log = logging.getLogger(__name__)

REPORT_FILE = "report.html"
_FREE = ("run", "which", "out", "fresh", "device")
"""Options that change nothing of what a section shows."""
_READS = {"zero_shot": "evaluation/zero_shot.json"}
"""Files of the run folder, besides checkpoints, that diagnostics read, where it is not the metrics."""


def make(analysis: Analysis, diagnostics: list[Diagnostic], out: Path) -> list[Missing]:
    """Write a folder a section and report.html into `out`; return what failed.

    A diagnostic that fails is reported with its traceback and does not keep the others from being made. What an
    earlier analysis of the same checkpoints with the same options left is kept, unless `fresh`.
    """
    missing: list[Missing] = []
    failed: list[Missing] = []
    for number, diagnostic in enumerate(diagnostics, start=1):
        say = f"{number}/{len(diagnostics)} {diagnostic.name} ({diagnostic.shows})"
        identity = identity_of(analysis, diagnostic.name)
        found = load(out / diagnostic.name)
        if found is not None and found.identity == identity and not analysis.options.fresh:
            log.info("%s: kept from before", say)
            continue
        start = time.monotonic()
        try:
            section = diagnostic.load()(analysis)
            saved = save(section, out / diagnostic.name, identity, time.monotonic() - start)
            log.info("%s: %.1f s", say, saved.seconds)
            for finding in saved.findings:
                log.info("    %s", finding)
        except SkippedError as reason:
            log.info("%s: not shown, %s", say, reason)
            missing.append(Missing(diagnostic.name, diagnostic.shows, str(reason)))
        except Exception as error:
            log.error("%s failed\n%s", say, traceback.format_exc())
            failed.append(
                Missing(diagnostic.name, diagnostic.shows, f"failed: {type(error).__name__}: {error}")
            )
    write_report(out / REPORT_FILE, analysis.runs, _sections(analysis, out), missing + failed)
    return failed


def _sections(analysis: Analysis, out: Path) -> list[SavedSection]:
    """What is in `out` of these checkpoints, in the report's order: also what `which` did not name this time."""
    found = [(diagnostic.name, load(out / diagnostic.name)) for diagnostic in DIAGNOSTICS]
    return [
        section
        for name, section in found
        if section is not None and section.identity == identity_of(analysis, name)
    ]


def identity_of(analysis: Analysis, name: str) -> dict[str, Any]:
    """Return what a diagnostic's outcome depends on, as JSON values."""
    options = {name: value for name, value in asdict(analysis.options).items() if name not in _FREE}
    return {
        "version": tide_mega.__version__,
        "options": options,
        "runs": [_run_identity(run, name) for run in analysis.runs],
    }


def _run_identity(run: TrainedRun, name: str) -> dict[str, Any]:
    logged = run.folder / _READS.get(name, "metrics.jsonl")
    return {
        "label": run.label,
        "checkpoint": run.weights.state.save_id,
        "history": [weights.state.save_id for weights in run.history],
        "logged": hashlib.sha256(logged.read_bytes()).hexdigest() if logged.exists() else None,
    }
