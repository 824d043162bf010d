import pytest

from tests.support.tools import tool_module
from tide_mega.errors import Exit
from tide_mega.lab.bench.odd_inputs import KINDS


@pytest.fixture(scope="module")
def tool():
    with tool_module("fuzz_inputs") as module:
        yield module


@pytest.mark.parametrize(
    ("status", "stdout", "stderr", "escaped", "said"),
    [
        (0, "done\n", "a warning\nanother\n", "", None),
        (2, "", "optim.lr=x has the wrong type: it takes float.\n", "", None),
        (1, "1 of 3 damaged\n", "", "", None),
        (3, "", "tokenising:  10%|# | 1/10 [00:00<?, ?B/s]\nerror: a.txt is damaged.\n", "", None),
        (
            8,
            "",
            "optim.lr=-1.0 is not positive: give a number above 0.\nSweep: 0 of 1 points done:\n",
            "",
            None,
        ),
        (
            2,
            "",
            "usage: train [--help]\ntrain: error: unrecognized arguments\n",
            "",
            "2 lines on standard error",
        ),
        (
            1,
            "",
            "",
            "Traceback (most recent call last):\nKeyError: 'x'\n",
            "an exception escaped: KeyError: 'x'",
        ),
        (1, "Traceback (most recent call last):\n", "", "", "a traceback was printed"),
        (9, "", "so", "", "status 9 is not documented"),
        (1, "", "\n", "", "status 1 without a word"),
    ],
)
def test_how_a_command_may_end(tool, status, stdout, stderr, escaped, said):
    assert tool.complaint(tool.Ending(status, stdout, stderr, escaped)) == said


def test_a_case_that_takes_too_long_is_ended_and_named(tool, monkeypatch):
    def forever():
        while True:
            pass

    monkeypatch.setattr(tool, "_entry", lambda case: forever)
    ending = tool.end_of(tool.Case("train", []), seconds=1)
    assert tool.complaint(ending) == "an exception escaped: TooLongError: nothing for 1 s".replace(
        "TooLongError", f"{tool.TooLongError.__module__}.TooLongError"
    )


@pytest.mark.parametrize(
    ("word", "sentence"), [("kinds=x", "kinds=x is unknown"), ("cases=0", "cases=0 is too small")]
)
def test_a_wrong_argument_is_refused(tool, word, sentence):
    with pytest.raises(ValueError, match=sentence):
        tool.main([word])


@pytest.mark.slow
def test_generated_inputs_end_in_success_or_in_a_sentence(tool, capsys):
    assert tool.main([f"cases={12 * len(KINDS)}", "seed=11"]) == Exit.DONE, capsys.readouterr().out
