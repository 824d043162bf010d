"""The parity tool, from its arguments to its exit status."""

import threading

import pytest

from tests.support.tools import tool_module
from tide_mega.lab.parity.case import FULL, QUICK, Case
from tide_mega.lab.parity.check import Deviation, compare
from tide_mega.lab.parity.pool import WorkerPool

SOUND = Deviation(1e-7, 2e-7, {"layers.0.mlp.linear_fc1.weight": 3e-6, "memory.tables": 1e-7})


@pytest.fixture(scope="module")
def tool():
    with tool_module("check_parity") as module:
        yield module


@pytest.fixture
def status(tool, capsys):
    """Run the tool; returns (status, stdout, stderr)."""

    def run(*words):
        try:
            code = tool.main(list(words))
        except SystemExit as stopped:
            code = stopped.code
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


class ReadyPool:
    """In place of the worker processes: calls in this one."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def start(self):
        pass

    def run(self, function, case):
        return [function(case)] * self.size


@pytest.fixture
def answers(tool, monkeypatch):
    """Give the deviation of each case by hand; those not named are sound."""
    given = {}
    check_all = tool.check_all
    monkeypatch.setattr(tool, "compare", lambda case: given.get(case, SOUND))
    monkeypatch.setattr(tool, "check_all", lambda cases, compare: check_all(cases, compare, ReadyPool))
    return given


def test_the_quick_grid_prints_a_line_a_topology(status, answers):
    code, shown, error = status("--grid", "quick")
    assert (code, error) == (0, "")
    head, *lines, summary = shown.splitlines()
    assert len(lines) == len(QUICK)
    assert len({row.index("ok") for row in lines}) == 1
    assert head.split()[:2] == ["procs", "topology"]
    assert lines[0].split()[:6] == ["1", "plain", "1.0e-07", "2.0e-07", "3.0e-06", "1.0e-07"]
    assert lines[0].endswith("ok    layers.0.mlp.linear_fc1.weight")
    assert summary.startswith(f"{len(QUICK)} topologies, {len(QUICK)} agree, 0 fail, ")


def test_the_full_grid_goes_from_one_process_to_eight(status, answers):
    code, shown, _ = status("--grid", "full")
    processes = [int(row.split()[0]) for row in shown.splitlines()[1:-1]]
    assert code == 0
    assert processes == sorted(processes)
    assert len(processes) == len(FULL) >= 24
    assert set(processes) == {1, 2, 4, 8}


def test_one_number_over_its_bound_is_status_1(status, answers):
    answers[QUICK[4]] = Deviation(1e-7, 2e-7, {"layers.1.router_JD": 2e-5, "memory.tables": 0.0})
    code, shown, _ = status("--grid", "quick")
    assert code == 1
    (bad,) = [row for row in shown.splitlines() if "FAIL" in row]
    assert str(QUICK[4]) in bad
    assert "       layers.1.router_JD 2.0e-05 > 1e-05" in shown.splitlines()
    assert f"{len(QUICK)} topologies, {len(QUICK) - 1} agree, 1 fail" in shown


def test_in_bf16_tensors_are_shown_in_units_of_its_own_error(status, answers):
    case = Case(precision="bf16")
    answers[case] = Deviation(1e-4, 1e-3, {"layers.1.router_JD": 1.25, "memory.tables": 0.5})
    code, shown, _ = status("--case", "precision=bf16")
    assert code == 0
    assert shown.splitlines()[1].split()[4:6] == ["1.25x", "0.50x"]


def test_without_tables_there_is_a_dash(status, answers):
    answers[Case(num_blocks=0)] = Deviation(0.0, 0.0, {"layers.1.mlp": 0.0})
    assert status("--case", "num_blocks=0")[1].splitlines()[1].split()[5] == "-"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Nothing to check: give --grid quick, --grid full, or --case key=value ... (see --help)."),
        (["--grid"], "--grid has no name: use quick or full."),
        (["--grid", "huge"], "--grid=huge does not exist: use quick or full."),
        (["--grid", "quick", "--case"], "--grid quick --case cannot be read: give --grid quick,"),
        (["tensor=2"], "tensor=2 cannot be read: give --grid quick"),
        (["--case", "tensr=2"], "Unknown key tensr: did you mean tensor?"),
        (["--case", "tensor=two"], "tensor=two has the wrong type: it takes int"),
        (["--case", "tensor"], "'tensor' is not key=value"),
        (
            ["--case", "tensor=3"],
            "parallel.tensor=3 does not divide model.num_attention_heads=4: use 1 or 2.",
        ),
        (
            ["--case", "data=2", "zero_stage=3", "owners=tensor_data"],
            "parallel.zero_stage=3 does not run with",
        ),
        (["--case", "device=cuda"], "device=cuda is not for this tool's gloo processes: use cpu"),
        (["--case", "data=99"], "needs 99 processes: ask for at most 16."),
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_one_sentence_and_status_2(status, monkeypatch, tool, words, message):
    monkeypatch.setattr(tool, "check_all", None)
    code, shown, error = status(*words)
    assert (code, shown) == (2, "")
    assert message in error
    assert error.count("\n") == 1


def test_help_tells_bounds_eps_and_every_key(status):
    code, shown, _ = status("--help")
    assert code == 0
    assert "eps is 1e-4" in shown
    for name in Case.__dataclass_fields__:
        assert f"\n  {name} (" in shown


def wrong_in_the_tables(case):
    """Compare for real, then spoil one number, as a broken exchange would."""
    found = compare(case)
    return Deviation(found.loss, found.norm, {**found.tensors, "memory.tables": 0.01})


def hang(case):
    threading.Event().wait()


def test_a_real_case_passes_and_its_broken_comparison_does_not(status, tool, monkeypatch, pools):
    class SharedPool(ReadyPool):
        def run(self, function, case):
            return pools(self.size).run(function, case)

    check_all = tool.check_all
    monkeypatch.setattr(tool, "check_all", lambda cases, compare: check_all(cases, compare, SharedPool))
    words = ("--case", "data=2", "owners=tensor_data", "num_blocks=2", "accumulation=1")
    code, shown, _ = status(*words)
    assert code == 0, shown
    monkeypatch.setattr(tool, "compare", wrong_in_the_tables)
    code, shown, _ = status(*words)
    assert code == 1
    assert "memory.tables 1.0e-02 > 1e-05" in shown


@pytest.mark.slow
def test_a_case_that_hangs_ends_with_a_line(status, tool, monkeypatch):
    class Impatient(WorkerPool):
        def run(self, function, case):
            self.start()
            self.timeout = 1
            return super().run(function, case)

    check_all = tool.check_all
    monkeypatch.setattr(tool, "check_all", lambda cases, compare: check_all(cases, compare, Impatient))
    monkeypatch.setattr(tool, "compare", hang)
    code, shown, _ = status("--case", "num_blocks=0")
    assert code == 1
    assert "FAIL  rank 0: no answer in 1 s" in shown
