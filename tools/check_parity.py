"""Any topology against the plain single-process reference: trained side by side, every number compared.

    python tools/check_parity.py --grid full
    python tools/check_parity.py --grid quick
    python tools/check_parity.py --case tensor=2 data=2 sequence_parallel=true owners=tensor_data

Each case starts 1 to 8 processes on this machine's CPU (gloo), builds the model of the training run in them and a
plain-torch model beside it with the same initial weights, and trains both on the same tokens for 5 AdamW steps
with clipping active. Compared, each by its largest relative difference over all processes: the loss and the global
gradient norm of every step, and every parameter and table row at the end (largest difference over the tensor's
largest magnitude).

Bounds: 1e-5 in fp32. In bf16 1e-2 for the loss and 3e-2 for the norm; a tensor's update may have 1.5 times (x) the
error, in the L2 norm, of the plain reference computing in bf16 itself.

Adam's eps is 1e-4 in these runs, not the paper's 1e-8: Adam divides by sqrt(v) + eps, so for a gradient near 0 a
smaller eps turns fp32 rounding into a whole step of either sign, in any two correct programs. With eps = 1e-6 a
few elements differ by 4e-5, losses and norms by no more than with 1e-4.

--grid full runs every topology of tide_mega.lab.parity.case, --grid quick a few of them, --case the one that its
key=value words describe. Exit status: 0 all agree, 1 a number is over its bound or a case failed or hung, 2 wrong
arguments.
"""

import sys
import time
from collections.abc import Sequence

from tide_mega.config.command_line import tool_entry
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.errors import ConfigError, refuse
from tide_mega.lab.parity.case import GRIDS, Case, check_case
from tide_mega.lab.parity.check import Outcome, check_all, compare

USAGE = "give --grid quick, --grid full, or --case key=value ... (see --help)"
NUMBERS = f"{'loss':>7}  {'norm':>7}  {'params':>7}  {'rows':>7}  {'seconds':>7}"


def read_arguments(words: Sequence[str]) -> list[Case]:
    """Return the cases that the arguments select.

    Raises:
        ConfigError: one sentence that names the wrong argument and a valid one.
        SystemExit: `--help` (status 0), or a wrong key or type after `--case` (status 2).
    """
    if "--help" in words or "-h" in words:
        parse_tool_cli(Case, ["--help"], doc=__doc__ or "")
    match list(words):
        case ["--grid", name] if name in GRIDS:
            return GRIDS[name]
        case ["--grid"]:
            raise ConfigError("--grid has no name: use quick or full.")
        case ["--grid", name]:
            refuse("--grid", name, "does not exist", "use quick or full")
        case ["--case", *keys]:
            return [parse_tool_cli(Case, keys, doc=__doc__ or "")]
        case []:
            raise ConfigError(f"Nothing to check: {USAGE}.")
    raise ConfigError(f"{' '.join(words)} cannot be read: {USAGE}.")


def check_runnable(cases: Sequence[Case]) -> None:
    """Refuse cases that cannot run, before any process starts.

    Raises:
        ConfigError: the rule's sentence.
    """
    for case in cases:
        if case.device != "cpu":
            refuse(
                "device",
                case.device,
                "is not for this tool's gloo processes",
                "use cpu, or tools/gpu_check.sh",
            )
        check_case(case)


def header(width: int) -> str:
    """Return the table's header line."""
    return f"procs  {'topology':<{width}}  {NUMBERS}        worst tensor"


def line(outcome: Outcome, width: int) -> str:
    """Return a case's line, followed by the details of a failure."""
    case, deviation = outcome.case, outcome.deviation
    verdict = "FAIL" if outcome.failures else "ok"
    start = f"{case.world:>5}  {case!s:<{width}}"
    if deviation is None:
        numbers, worst = "  ".join(["-".rjust(7)] * 4), outcome.failures[0].splitlines()[-1]
    else:
        unit = "{:.2f}x" if case.precision == "bf16" else "{:.1e}"
        tables = deviation.tables()
        shown = [
            f"{deviation.loss:.1e}",
            f"{deviation.norm:.1e}",
            unit.format(deviation.worst_parameter()[1]),
        ]
        shown.append("-" if tables is None else unit.format(tables))
        numbers, worst = "  ".join(text.rjust(7) for text in shown), deviation.worst_tensor()[0]
    text = f"{start}  {numbers}  {outcome.seconds:>7.1f}  {verdict:<4}  {worst}"
    return "\n".join(
        [text, *(f"       {detail}" for failure in outcome.failures for detail in failure.splitlines())]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    try:
        cases = read_arguments(sys.argv[1:] if argv is None else argv)
        check_runnable(cases)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    width = max(len(str(case)) for case in cases)
    print(header(width), flush=True)
    outcomes, start = [], time.monotonic()
    try:
        for outcome in check_all(cases, compare):
            outcomes.append(outcome)
            print(line(outcome, width), flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    failed = sum(bool(outcome.failures) for outcome in outcomes)
    seconds = time.monotonic() - start
    print(
        f"{len(outcomes)} topologies, {len(outcomes) - failed} agree, {failed} fail, {seconds:.0f} s in all"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    tool_entry(main)
