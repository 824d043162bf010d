"""Makes the chosen diagnostics one after the other, keeps what is up to date, and writes the report."""

import logging
import time
import traceback
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import tide_mega
from tide_mega.errors import StatedError, without_credentials
from tide_mega.files import fingerprint_of, sha256_of
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.registry import DIAGNOSTICS, Diagnostic
from tide_mega.lab.figures.report import Missing, write_report
from tide_mega.lab.figures.section import SavedSection, load, save
from tide_mega.trained.run import TrainedRun

log = logging.getLogger(__name__)

REPORT_FILE = "report.html"
_DATASET = ("index.json", "counts.npy", "deciles.npy")
"""Files of the prepared dataset; the index has the checksums of all others."""


def make(analysis: Analysis, diagnostics: list[Diagnostic]) -> list[Missing]:
    """Write a folder per section and report.html into `analysis.out`; return what failed.

    A failing diagnostic is reported with its traceback and does not stop the others. Sections that an earlier
    analysis made of the same checkpoints with the same options are kept, unless `fresh`.
    """
    out = analysis.out
    out.mkdir(parents=True, exist_ok=True)
    missing: list[Missing] = []
    failed: list[Missing] = []
    for number, diagnostic in enumerate(diagnostics, start=1):
        say = f"{number}/{len(diagnostics)} {diagnostic.name} ({diagnostic.shows})"
        identity = identity_of(analysis, diagnostic)
        found = load(out / diagnostic.name, diagnostic)
        if found is not None and found.identity == identity and not analysis.options.fresh:
            log.info("%s: kept from before", say)
            continue
        start = time.monotonic()
        try:
            section = diagnostic.load()(analysis)
            saved = save(section, diagnostic, out / diagnostic.name, identity, time.monotonic() - start)
            log.info("%s: %.1f s", say, saved.seconds)
            for finding in saved.findings:
                log.info("    %s", finding)
        except SkippedError as reason:
            log.info("%s: not shown, %s", say, reason)
            missing.append(Missing(diagnostic.name, diagnostic.shows, str(reason)))
        except Exception as error:
            said = str(error) if isinstance(error, StatedError) else traceback.format_exc()
            log.error("%s failed\n%s", say, said)
            why = without_credentials(f"failed: {type(error).__name__}: {error}")
            failed.append(Missing(diagnostic.name, diagnostic.shows, why))
    gone = missing + failed
    sections, outdated = _sections(analysis, {of.name for of in gone})
    write_report(out / REPORT_FILE, analysis.runs, sections, gone + outdated)
    return failed


def _sections(analysis: Analysis, without: set[str]) -> tuple[list[SavedSection], list[Missing]]:
    """Return the existing sections, in the report's order, whether or not `which` names them; and the outdated."""
    sections, outdated = [], []
    for diagnostic in DIAGNOSTICS:
        section = None if diagnostic.name in without else load(analysis.out / diagnostic.name, diagnostic)
        if section is None:
            continue
        if section.identity == identity_of(analysis, diagnostic):
            sections.append(section)
        else:
            reason = (
                f"what there is was made with other options or inputs: which={diagnostic.name} makes it again"
            )
            outdated.append(Missing(diagnostic.name, diagnostic.shows, reason))
    return sections, outdated


def identity_of(analysis: Analysis, diagnostic: Diagnostic) -> dict[str, Any]:
    """Return everything a diagnostic's result depends on, as JSON values."""
    options = asdict(analysis.options)
    identity: dict[str, Any] = {
        "version": tide_mega.__version__,
        "code": _code(),
        "options": {
            name: options[name] for name in ("precision", "seed", *diagnostic.options) if name != "texts"
        },
        "runs": [_run_identity(run, diagnostic) for run in analysis.runs],
    }
    if "texts" in diagnostic.options:
        texts = [Path(text) for text in analysis.options.texts]
        identity["texts"] = [[text.name, sha256_of(text)] for text in texts]
    return identity


@cache
def _code() -> str:
    """Fingerprint this package's sources: in a checkout they change under one version."""
    folder = Path(__file__).parent
    return fingerprint_of({str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*.py")})


def _run_identity(run: TrainedRun, diagnostic: Diagnostic) -> dict[str, Any]:
    files = [
        run.folder / "config.yaml",
        run.folder / diagnostic.reads,
        *(run.data / name for name in _DATASET),
    ]
    return {
        "label": run.label,
        "checkpoint": run.weights.state.save_id,
        "history": [weights.state.save_id for weights in run.history],
        "files": {path.name: sha256_of(path) if path.exists() else None for path in files},
    }
