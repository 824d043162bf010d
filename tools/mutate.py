"""Mutation testing: plants small mistakes in the code of a room, one at a time, and runs the room's tests on each.

    python tools/mutate.py                                  # a sample of every room
    python tools/mutate.py rooms=memory,data count=40 out=mutants.json
    python tools/mutate.py rooms=data only=frequency.py count=1000

A mutant is one change: a comparison, sum, condition, number or truth value turned into its neighbour, or a call,
an addition in place or a refusal left out. It is written into a copy of the checkout and judged by the test files
of its module, stopping at the first failure: killed, or survived. Survivors are listed with file and line; each is
a missing test, or a change without effect. Libraries are imported once and each mutant is judged in a fork, which
takes seconds; processes that tests start see the mutant too. Linux and macOS.

Exit status: 0 all mutants were judged, whatever the verdicts; 1 tests fail without a mutant; 2 wrong arguments.
"""

import ast
import contextlib
import copy
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tide_mega.config.command_line import hush_libraries, tool_entry
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.errors import refuse

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = ("torch", "numpy", "matplotlib.pyplot", "hypothesis", "pytest", "megatron.core.models.gpt")
"""Imported before the first mutant is judged; the project itself is not."""
PATIENCE = 4.0
GRACE_SECONDS = 60.0
"""A mutant whose tests take longer than PATIENCE times their usual time plus GRACE_SECONDS counts as killed."""
LOG = "mutant.log"
PYTEST = "-x -q -p no:cacheprovider --hypothesis-seed=0"
OWN = ("tide_mega", "tests")

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATIONS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitXor,
    ast.BitXor: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
SPEAKING = frozenset({"log", "print", "logging", "warnings"})
"""Names whose calls only produce messages."""


def _room(folder: str, tests: str, /, **judges: str) -> dict[str, tuple[str, ...]]:
    """Map files of a folder to the test files that judge them; names without `.py`, `__` for `/`."""
    return {
        f"{folder}/{module.replace('__', '/')}.py": tuple(f"{tests}/test_{name}.py" for name in names.split())
        for module, names in judges.items()
    }


ROOMS: dict[str, dict[str, tuple[str, ...]]] = {
    "memory": _room(
        "tide_mega/memory",
        "tests/memory",
        ranges="ranges table_gradient",
        ownership="ownership",
        owned="owned table_gradient",
        plan="plan route",
    ),
    "kernels": _room(
        "tide_mega/kernels",
        "tests/kernels",
        mix__naive="mix row_lookup",
        mix__cpu="mix",
        row_gradient__cpu="row_gradient mix",
        row_gradient__naive="row_gradient row_lookup",
        row_gradient__sink="row_gradient mix",
        row_lookup="row_lookup",
        row_norm__cpu="row_norm",
        token_order="token_order row_gradient",
        choice="choice",
    ),
    "loss": _room(
        "tide_mega/kernels/vocab_loss",
        "tests/kernels",
        chunked="vocab_loss",
        naive="vocab_loss",
        softmax="vocab_loss",
    ),
    "engine": _room("tide_mega/parallel", "tests/parallel", engine="engine", accumulation="accumulation"),
    "checkpoints": _room(
        "tide_mega/checkpoint",
        "tests/checkpoint",
        contents="boxes",
        folder="damage",
        storage="storage damage",
    ),
    "data": _room(
        "tide_mega/data",
        "tests/data",
        index="index stream",
        frequency="frequency",
        loader="loader permutation",
        prepare__inputs="inputs units",
        prepare__worker="packing",
    ),
    "deciles": _room("tide_mega/metrics", "tests/metrics", deciles="deciles exact_deciles")
    | _room(
        "tide_mega/lab/figures", "tests/figures", deciles="decile_check", decile_comparison="decile_report"
    ),
    "refusals": _room("tide_mega/config", "tests/config", validate="validate", shape_rules="shape_rules"),
    "reactions": _room(
        "tide_mega/training/faults",
        "tests/training/faults",
        policy="policy spike",
        stragglers="straggler",
    ),
}


@dataclass
class MutateOptions:
    """Arguments."""

    rooms: list[str] = field(default_factory=lambda: list(ROOMS))
    """Which rooms."""
    count: int = 20
    """Mutants of each room, drawn from all there are."""
    seed: int = 0
    """Of the draw."""
    only: str = ""
    """Only files whose path ends with this."""
    out: str | None = None
    """JSON file for every mutant and its verdict; mutants already in the file count and are not judged again."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    line: int
    what: str
    place: int
    """Index of the changed node in `ast.walk` order."""


@dataclass(frozen=True)
class Judged:
    """A mutant and its verdict."""

    room: str
    mutant: Mutant
    killed: bool
    seconds: float

    @property
    def line(self) -> str:
        """Return the line for the log."""
        mutant = self.mutant
        fate = "killed  " if self.killed else "SURVIVED"
        return f"{fate} {self.seconds:5.1f} s  {mutant.path}:{mutant.line}  {mutant.what}"


def mutants_of(path: str, source: str) -> list[Mutant]:
    """Return every mutant of a file, in the order of its syntax tree."""
    tree = ast.parse(source)
    passed_over = _passed_over(tree)
    found = []
    for place, node in enumerate(ast.walk(tree)):
        if id(node) not in passed_over and (change := _change(copy.copy(node))) is not None:
            after = ast.unparse(change)
            what = f"{ast.unparse(node)}  ->  {after}"
            found.append(Mutant(path, getattr(node, "lineno", 0), " ".join(what.split())[:160], place))
    return found


def mutate(source: str, mutant: Mutant) -> str:
    """Return the source with the mutant's change, without its comments."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    target = nodes[mutant.place]
    change = _change(copy.copy(target))
    assert change is not None
    for parent in nodes:
        for name, value in ast.iter_fields(parent):
            if value is target:
                setattr(parent, name, change)
            elif isinstance(value, list):
                value[:] = [change if item is target else item for item in value]
    return ast.unparse(ast.fix_missing_locations(tree))


def _passed_over(tree: ast.AST) -> set[int]:
    """Return nodes without effect on behaviour: annotations, decorators, messages and assertions."""
    kept_out: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            kept_out += [*node.decorator_list, *([node.returns] if node.returns else [])]
        elif isinstance(node, ast.ClassDef):
            kept_out += node.decorator_list
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            kept_out.append(node.annotation)
        elif isinstance(node, ast.JoinedStr | ast.Assert) or _speaks(node) or _asserts(node):
            kept_out.append(node)
    return {id(inner) for node in kept_out for inner in ast.walk(node)}


def _speaks(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    function = node.value.func
    while isinstance(function, ast.Attribute):
        function = function.value
    return isinstance(function, ast.Name) and function.id in SPEAKING


def _asserts(node: ast.AST) -> bool:
    """Whether this is `strict=` of a zip, an assertion too."""
    return isinstance(node, ast.keyword) and node.arg == "strict"


def _change(node: ast.AST) -> ast.AST | None:
    """Return the changed node, given a shallow copy to modify; None if it is not changed."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARISONS:
            node.ops = [COMPARISONS[type(op)]()]
        case ast.BinOp(op=op) if type(op) in OPERATIONS and not (_is_text(node.left) or _is_text(node.right)):
            node.op = OPERATIONS[type(op)]()
        case ast.BoolOp(op=op):
            node.op = ast.Or() if isinstance(op, ast.And) else ast.And()
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return operand
        case ast.Constant(value=bool(value)):
            return ast.Constant(not value)
        case ast.Constant(value=int(value)):
            return ast.Constant(value + 1)
        case ast.If(test=test) if not isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp):
            node.test = ast.UnaryOp(ast.Not(), test)
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            return ast.Pass()
        case _:
            return None
    return node


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


class Judge:
    """Runs tests in forks of this process, in a copy of the checkout."""

    def __init__(self, checkout: Path) -> None:
        """Work in a copy."""
        self.copy = checkout
        os.environ["PYTHONPATH"] = str(checkout)
        # Cached bytecode is matched by size and mtime in seconds, which consecutive mutants may share.
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        hush_libraries()
        for name in PRELOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)

    def passes(self, tests: Sequence[str], seconds: float | None = None) -> bool:
        """Whether the tests pass, within `seconds`."""
        if (child := os.fork()) == 0:
            self._test(tests)
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status) == 0
            if deadline is not None and time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return False
            time.sleep(0.05)

    def judge(self, room: str, mutant: Mutant, tests: Sequence[str], seconds: float) -> Judged:
        """Plant the mutant, run the tests, put the file back."""
        file, began = self.copy / mutant.path, time.monotonic()
        source = file.read_text()
        file.write_text(mutate(source, mutant))
        try:
            survives = self.passes(tests, seconds)
        finally:
            file.write_text(source)
        return Judged(room, mutant, not survives, time.monotonic() - began)

    def _test(self, tests: Sequence[str]) -> None:
        """Run the tests as the forked child; never returns."""
        status = 1
        try:
            os.setpgid(0, 0)
            os.chdir(self.copy)
            log = os.open(self.copy / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
            for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
                del sys.modules[name]
            others = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
            sys.path[:] = [str(self.copy), *others]
            sys.dont_write_bytecode = True
            import pytest

            status = int(pytest.main([*PYTEST.split(), "-m", "not slow and not gpu", *tests]))
        finally:
            with contextlib.suppress(ProcessLookupError):
                sys.stdout.flush()
            os._exit(status)


@contextlib.contextmanager
def checkout_copy(root: Path) -> Iterator[Path]:
    """Context with a copy of the checkout, without ignored files, in a temporary folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for name in listed.stdout.splitlines():
            if (root / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / name, Path(folder) / name)
        yield Path(folder)


def drawn(options: MutateOptions, name: str, root: Path) -> list[Mutant]:
    """Return the mutants of a room to judge, in the order of its files."""
    paths = [path for path in ROOMS[name] if path.endswith(options.only)]
    everything = [mutant for path in paths for mutant in mutants_of(path, (root / path).read_text())]
    few = random.Random(f"{name}/{options.seed}").sample(everything, min(options.count, len(everything)))
    return sorted(few, key=lambda mutant: (paths.index(mutant.path), mutant.place))


def read_judged(out: Path | None) -> list[Judged]:
    """Return the verdicts of an earlier call."""
    if out is None or not out.exists():
        return []
    lines = json.loads(out.read_text())
    return [Judged(**{**line, "mutant": Mutant(**line["mutant"])}) for line in lines]


def judge_rooms(options: MutateOptions, judge: Judge) -> list[Judged] | str:
    """Judge the drawn mutants; return all verdicts, including those in `out`, or why tests cannot judge."""
    out = Path(options.out) if options.out else None
    judged = read_judged(out)
    known = {(of.room, of.mutant) for of in judged}
    alone: dict[tuple[str, ...], float] = {}
    for name in options.rooms:
        for mutant in drawn(options, name, judge.copy):
            if (name, mutant) in known:
                continue
            tests = ROOMS[name][mutant.path]
            if tests not in alone:
                began = time.monotonic()
                if not judge.passes(tests):
                    log = (judge.copy / LOG).read_text()[-3000:]
                    return f"{' '.join(tests)} fails without a mutant, and cannot judge any:\n{log}"
                alone[tests] = time.monotonic() - began
                print(f"{name}: {' '.join(tests)} in {alone[tests]:.1f} s without a mutant", flush=True)
            judged.append(judge.judge(name, mutant, tests, PATIENCE * alone[tests] + GRACE_SECONDS))
            print(judged[-1].line, flush=True)
            if out is not None:
                out.write_text(json.dumps([asdict(of) for of in judged], indent=1))
    return judged


def summary(judged: Sequence[Judged]) -> str:
    """Return the score by room, and the survivors."""
    lines = []
    for name in dict.fromkeys(of.room for of in judged):
        fates = [of.killed for of in judged if of.room == name]
        lines.append(f"{name:12} {sum(fates):4} of {len(fates):4} killed")
    killed = sum(of.killed for of in judged)
    lines.append(f"{'all':12} {killed:4} of {len(judged):4} killed ({killed / max(1, len(judged)):.0%})")
    return "\n".join([*lines, *(of.line for of in judged if not of.killed)])


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; see the top of this file."""
    options = parse_tool_cli(MutateOptions, argv, doc=__doc__ or "")
    for name in options.rooms:
        if name not in ROOMS:
            refuse("rooms", name, "does not exist", f"use {', '.join(ROOMS)}")
    if options.count < 1:
        refuse("count", options.count, "is not positive", "give 1 or more")
    with checkout_copy(ROOT) as folder:
        judged = judge_rooms(options, Judge(folder))
    if isinstance(judged, str):
        print(judged, file=sys.stderr)
        return 1
    print(summary(judged))
    return 0


if __name__ == "__main__":
    tool_entry(main)
