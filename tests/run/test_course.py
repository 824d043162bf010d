"""What a run is promised, and what is due on its way, when the batch changes under it."""

from dataclasses import dataclass

import pytest

from tide_mega.config.hydra_door import compose
from tide_mega.run.course import STEPS, TOKENS, Course


@dataclass(frozen=True)
class At:
    step: int
    tokens: int


def walk(course, at):
    """Every step to the end: (step, tokens, sequences)."""
    made = []
    while not course.is_complete(at):
        stride = course.next(at)
        at = At(at.step + 1, at.tokens + stride.sequences * course.seq_length)
        made.append((at.step, at.tokens, stride.sequences))
    return made


@pytest.mark.parametrize(("batch", "steps"), [(4, 2), (1, 8), (2, 4)])
def test_promised_tokens_are_had_with_another_batch(batch, steps):
    course, at = Course(TOKENS, 640, batch, 32), At(6, 384)
    made = walk(course, at)
    assert made[-1][:2] == (6 + steps, 640)
    assert all(sequences == batch for *_, sequences in made)
    assert course.total_steps(at) == 6 + steps
    assert [course.next(At(step, tokens - batch * 32)).is_last for step, tokens, _ in made] == [
        *[False] * (steps - 1),
        True,
    ]


def test_the_last_batch_has_what_is_left_and_no_sequence_more():
    course = Course(TOKENS, 600, 4, 32)
    assert walk(course, At(0, 0))[-2:] == [(4, 512, 4), (5, 608, 3)]
    assert course.total_steps(At(0, 0)) == 5
    assert course.is_complete(At(5, 608)) and not course.is_complete(At(5, 599))


def test_promised_steps_are_made_whatever_the_batch():
    course = Course(STEPS, 8, 4, 32)
    assert walk(course, At(6, 384)) == [(7, 512, 4), (8, 640, 4)]
    assert course.total_steps(At(6, 384)) == 8
    assert course.total_steps(At(9, 384)) == 9


def due(course, at, every, **values):
    marks = []
    while not course.is_complete(at):
        stride = course.next(at)
        at = At(at.step + 1, at.tokens + stride.sequences * course.seq_length)
        if stride.is_due(every, **values):
            marks.append((at.step, at.tokens))
    return marks


def test_what_is_due_follows_the_tokens_of_the_present_batch():
    # As in a run of this batch from its start: every 3 x 128 tokens.
    assert due(Course(TOKENS, 1280, 4, 32), At(6, 384), 3, at_end=False) == [(9, 768), (12, 1152)]
    # The batch changed between two marks: the first comes after what is left of the way.
    assert due(Course(TOKENS, 1280, 4, 32), At(5, 320), 3) == [(6, 448), (9, 832), (12, 1216), (13, 1280)]
    assert due(Course(TOKENS, 640, 1, 32), At(6, 384), 3, at_end=False) == [(9, 480), (12, 576)]


def test_with_one_batch_what_is_due_is_every_so_many_steps():
    for course in (Course(TOKENS, 640, 2, 32), Course(STEPS, 10, 2, 32)):
        steps = [step for step, _ in due(course, At(0, 0), 3)]
        assert steps == [3, 6, 9, 10]
        assert due(course, At(0, 0), 0) == [(10, 640)]
        assert due(course, At(0, 0), 0, at_end=False) == []


def test_the_promise_is_the_configurations():
    words = ["experiment=demo_tide", "trainer.global_batch_size=16"]
    assert Course.of(compose(words)) == Course(STEPS, 550, 16, compose(words).data.seq_length)
    tokens = compose([*words, "trainer.max_steps=null", "trainer.max_tokens=1_000_000"])
    assert Course.of(tokens) == Course(TOKENS, 1_000_000, 16, tokens.data.seq_length)
