"""From the ranks' reports to what is wrong and where, and to a table."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tide_mega.health.facts import Facts
from tide_mega.health.links import Suspicion
from tide_mega.health.rounds import EVERYBODY
from tide_mega.text_table import aligned

MAX_SKEW = 2.0
"""Maximum difference in seconds between a node's clock and the median."""
MIN_TMP = 10**9


@dataclass(frozen=True)
class Finding:
    """Something wrong."""

    node: str | None
    """The node that should not take part; None if no single node is at fault."""
    what: str

    def __str__(self) -> str:
        return f"{self.node}: {self.what}" if self.node else self.what


def judge(
    reports: Sequence[Facts],
    *,
    missing: Sequence[str] = (),
    suspicions: Sequence[Suspicion] = (),
    checkpoint_bytes: int = 0,
) -> list[Finding]:
    """Compare the reports and return what is wrong.

    Args:
        reports: of the ranks that took part.
        missing: names of those that did not.
        suspicions: from the all-reduces.
        checkpoint_bytes: size of a checkpoint of this run.
    """
    found = [Finding(name, "did not report in time") for name in missing]
    found += [Finding(report.node, problem) for report in reports for problem in report.problems]
    found += [Finding(suspicion.node, suspicion.what) for suspicion in suspicions]
    nodes = [report for report in reports if report.speaks_for_node]
    found += _differences(nodes, "versions")
    found += _differences(nodes, "gpus")
    for report in nodes:
        if report.gpus and len(report.gpus) < report.local_size:
            found.append(
                Finding(report.node, f"shows {len(report.gpus)} GPUs for {report.local_size} processes")
            )
        if report.root_free is not None and report.root_free < checkpoint_bytes:
            room = f"{report.root_free / 1e9:.1f} GB free, and a checkpoint needs {checkpoint_bytes / 1e9:.1f} GB"
            found.append(Finding(report.node, f"run.root has {room}"))
        if report.tmp_free is not None and report.tmp_free < MIN_TMP:
            found.append(Finding(report.node, f"TMPDIR has {report.tmp_free / 1e9:.2f} GB free"))
    found += _clocks(reports)
    return list(dict.fromkeys(found))


def _differences(nodes: Sequence[Facts], attribute: str) -> list[Finding]:
    """Return nodes that differ from the most common value; of equally common ones the lowest rank's is used."""
    found = []
    values = {
        report.node: _named(getattr(report, attribute)) for report in nodes if getattr(report, attribute)
    }
    for name in dict.fromkeys(name for value in values.values() for name in value):
        here = {node: value.get(name, "absent") for node, value in values.items()}
        usual, _ = Counter(here.values()).most_common(1)[0]
        found += [
            Finding(node, f"{name} is {value}, where {_others(here, usual)} {usual}")
            for node, value in here.items()
            if value != usual
        ]
    return found


def _named(value: dict[str, str] | list[str]) -> dict[str, str]:
    return value if isinstance(value, dict) else {f"GPU {i}": name for i, name in enumerate(value)}


def _others(values: dict[str, str], usual: str) -> str:
    count = sum(value == usual for value in values.values())
    return f"{count} other{'s have' if count > 1 else ' has'}"


def _clocks(reports: Sequence[Facts]) -> list[Finding]:
    if not reports:
        return []
    skews = _skews(reports)
    worst = {report.node: skew for report, skew in zip(reports, skews, strict=True) if abs(skew) > MAX_SKEW}
    return [Finding(node, f"its clock is {skew:+.1f} s from the others'") for node, skew in worst.items()]


def _skews(reports: Sequence[Facts]) -> list[float]:
    clocks = sorted(report.clock for report in reports)
    middle = clocks[(len(clocks) - 1) // 2]
    return [report.clock - middle for report in reports]


def table(reports: Sequence[Facts]) -> str:
    """Return a table with a line per node.

    Bus bandwidths, in GB/s, are given within the node, with its better neighbour, and over all ranks.
    """
    head = (
        *("node", "ranks", "GPUs", "root free GB", "tmp free GB", "clock ms"),
        *("inside GB/s", "pair GB/s", "all GB/s", "torch", "code"),
    )
    rows: list[tuple[str, ...]] = []
    skews = dict(zip((report.rank for report in reports), _skews(reports), strict=True))
    for report in reports:
        if report.speaks_for_node:
            here = [other for other in reports if other.node == report.node]
            ranks = [other.rank for other in here]
            rows.append(
                (
                    report.node,
                    f"{min(ranks)}-{max(ranks)}" if len(ranks) > 1 else str(ranks[0]),
                    f"{len(report.gpus)} x {report.gpus[0]}" if report.gpus else "none",
                    _giga(report.root_free),
                    _giga(report.tmp_free),
                    f"{1000 * skews[report.rank]:+.0f}",
                    *(_giga(rate) for rate in _rates(report.node, here)),
                    report.versions.get("torch", "-"),
                    report.versions.get("code", "-"),
                )
            )
    return aligned([head], rows, left=3)


def _rates(node: str, reports: Sequence[Facts]) -> tuple[float | None, float | None, float | None]:
    """Return the bandwidths within a node, with its better neighbour, and over all, each of the slowest rank."""
    seen = [report.outcome.rates for report in reports if report.outcome is not None]
    names = dict.fromkeys(name for rates in seen for name in rates)
    slowest = {name: min(rates[name] for rates in seen if name in rates) for name in names}
    pairs = [rate for name, rate in slowest.items() if name not in (node, EVERYBODY)]
    return slowest.get(node), max(pairs, default=None), slowest.get(EVERYBODY)


def _giga(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e9:.1f}"
