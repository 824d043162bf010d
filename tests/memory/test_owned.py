"""Tables with one owner a row, against the whole table in one place under torch's dense AdamW.

Shapes: V vocabulary, U distinct ids of a replica, W rows of an owner, K blocks, D width, N tokens.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.id_sets import exchanges, id_sets
from tests.support.slow import quick_and_slow
from tests.support.tables import BLOCKS, OPTIM, WIDTH, drawn, owned_tables, whole_rows
from tests.support.tables import fetch as fetch_rows
from tide_mega.config.schema import OptimConfig

QUICK = settings(max_examples=25, deadline=None)
LAYOUTS = [(1, 2), (2, 1), (2, 2), (1, 4)]
"""(tensor, data): on 2 and on 4 processes."""


@dataclass(frozen=True)
class Step:
    """One optimizer step: what each replica read, and what becomes of it."""

    ids_by_replica: list[list[int]]
    lr: float = 0.01
    scale: float = 1.0
    skipped: bool = False


def gradient_of(step, replica, ids):
    return drawn(len(ids), BLOCKS, WIDTH, seed=1000 * step + replica)


def take_steps(tables, steps, first=0):
    """Fetch, give gradients back and update; return what each fetch brought."""
    fetched = []
    for number, step in enumerate(steps, start=first):
        ids = step.ids_by_replica[tables.groups.data_rank]
        fetch = fetch_rows(tables, ids)
        fetched.append(tables.rows_of(fetch).float().numpy())
        grad_UKD = gradient_of(number, tables.groups.data_rank, ids).to(tables.dtype)
        tables.add_gradient(fetch, grad_UKD)
        if step.skipped:
            tables.drop_gradient()
        else:
            tables.step(step.lr, step.scale)
    return fetched


def train(vocabulary, tensor, steps):
    tables = owned_tables(vocabulary, tensor)
    fetched = take_steps(tables, steps)
    return fetched, tables.master_WKD.detach().numpy(), tables.gradient_WKD.numpy()


def dense_adamw(vocabulary, steps, optim=OPTIM):
    """The whole table before each step, and after the last, in fp64."""
    whole = drawn(vocabulary, BLOCKS, WIDTH, seed=1).double().requires_grad_()
    optimizer = torch.optim.AdamW(
        [whole], betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.weight_decay
    )
    history = []
    for number, step in enumerate(steps):
        history.append(whole.detach().numpy().copy())
        if step.skipped:
            continue
        whole.grad = torch.zeros_like(whole)
        for replica, ids in enumerate(step.ids_by_replica):
            whole.grad[ids] += gradient_of(number, replica, ids).double()
        whole.grad *= step.scale / len(step.ids_by_replica)
        optimizer.param_groups[0]["lr"] = step.lr * optim.table_lr_multiplier
        optimizer.step()
    return [*history, whole.detach().numpy()]


@st.composite
def trainings(draw, tensor, data):
    vocabulary = draw(st.integers(1, 21))
    step = st.builds(
        Step,
        st.lists(id_sets(vocabulary, tensor * data), min_size=data, max_size=data),
        lr=st.sampled_from([0.0, 0.001, 0.03]),
        scale=st.sampled_from([1.0, 0.25]),
        skipped=st.sampled_from([False, False, False, True]),
    )
    return vocabulary, draw(st.lists(step, min_size=1, max_size=5))


@pytest.mark.parametrize(("tensor", "data"), quick_and_slow(LAYOUTS[:2], LAYOUTS))
@QUICK
@given(draw=st.data())
def test_owners_train_as_dense_adamw_on_the_whole_table(pools, tensor, data, draw):
    vocabulary, steps = draw.draw(trainings(tensor, data))
    expected = dense_adamw(vocabulary, steps)
    results = pools(tensor * data).run(train, vocabulary, tensor, steps)
    for rank, (fetched, _, gradient) in enumerate(results):
        for rows, step, table in zip(fetched, steps, expected, strict=False):
            # megatron's order of ranks: tensor fastest
            ids = step.ids_by_replica[rank // tensor]
            np.testing.assert_allclose(rows, table[ids], rtol=2e-5, atol=2e-6)
        assert not gradient.any()
    shards = [master for _, master, _ in results]
    np.testing.assert_allclose(whole_rows(shards, vocabulary), expected[-1], rtol=2e-5, atol=2e-6)
    for rank, shard in enumerate(shards):
        real = len(range(rank, vocabulary, tensor * data))
        assert shard.shape == (-(-vocabulary // (tensor * data)), BLOCKS, WIDTH)
        assert not shard[real:].any(), "a row beyond the vocabulary was trained"


def test_an_untouched_row_decays_and_goes_on_with_its_fading_moments(pools):
    touched = Step([[2], [2, 5]], lr=0.01, scale=0.5)
    untouched = Step([[], [0]], lr=0.01)
    results = pools(2).run(train, 7, 1, [touched, untouched, untouched])
    rows = whole_rows([master for _, master, _ in results], 7)
    start = drawn(7, BLOCKS, WIDTH, seed=1).double().numpy()
    lr = 0.01 * OPTIM.table_lr_multiplier
    kept = (1 - lr * OPTIM.weight_decay) ** 3
    np.testing.assert_allclose(rows[[1, 3, 4, 6]], start[[1, 3, 4, 6]] * kept, rtol=1e-6)
    # Row 5, by Adam's formulas: one gradient, then two steps without.
    gradient = gradient_of(0, 1, [2, 5])[1].double().numpy() * 0.5 / 2
    expected, first, second = start[5], 0.0, 0.0
    for t, g in enumerate((gradient, 0.0, 0.0), start=1):
        expected = expected * (1 - lr * OPTIM.weight_decay)
        first = OPTIM.beta1 * first + (1 - OPTIM.beta1) * g
        second = OPTIM.beta2 * second + (1 - OPTIM.beta2) * g * g
        expected = expected - lr * (first / (1 - OPTIM.beta1**t)) / (
            np.sqrt(second / (1 - OPTIM.beta2**t)) + OPTIM.eps
        )
    np.testing.assert_allclose(rows[5], expected, rtol=1e-5)


def test_tables_have_their_own_weight_decay(pools):
    results = pools(2).run(train_without_decay)
    rows = whole_rows(results, 5)
    np.testing.assert_array_equal(rows, drawn(5, BLOCKS, WIDTH, seed=1).numpy())


def train_without_decay():
    tables = owned_tables(5, 1, optim=OptimConfig(weight_decay=0.1, table_weight_decay=0.0))
    take_steps(tables, [Step([[], []])] * 2)
    return tables.master_WKD.detach().numpy()


def skip(vocabulary, steps):
    """Whether a skipped step left master, moments and gradient as they were."""
    tables = owned_tables(vocabulary, 1)
    take_steps(tables, steps[:1])
    before = {name: value.clone() for name, value in tables.kept().items()} | {
        "updates": torch.tensor(tables.updates)
    }
    ids = steps[1].ids_by_replica[tables.groups.data_rank]
    fetch = fetch_rows(tables, ids)
    tables.rows_of(fetch)
    tables.add_gradient(fetch, torch.full((len(ids), BLOCKS, WIDTH), float("nan")))
    tables.drop_gradient()
    after = tables.kept() | {"updates": torch.tensor(tables.updates)}
    return [
        *(torch.equal(after[name], before[name]) for name in before),
        after.keys() == before.keys(),
        not tables.gradient_WKD.any(),
        float(tables.square_norm()) == 0,
    ]


@QUICK
@given(first=exchanges(askers=2, members=2), draw=st.data())
def test_a_skipped_step_changes_nothing(pools, first, draw):
    vocabulary, ids = first
    other = draw.draw(st.lists(id_sets(vocabulary, 2), min_size=2, max_size=2))
    for unchanged in pools(2).run(skip, vocabulary, [Step(ids), Step(other)]):
        assert len(unchanged) >= 6
        assert all(unchanged)


def resume(vocabulary, steps):
    """Final masters of a run, and of one whose owners were made anew from `kept` in the middle."""
    whole = owned_tables(vocabulary, 1)
    take_steps(whole, steps)
    broken = owned_tables(vocabulary, 1)
    middle = len(steps) // 2
    take_steps(broken, steps[:middle])
    saved = {name: value.clone() for name, value in broken.kept().items()}
    anew = owned_tables(vocabulary, 1)
    with torch.no_grad():
        anew.master_WKD.fill_(7)
    for name, memory in anew.kept().items():
        memory.copy_(saved[name])
    anew.updates = broken.updates
    restored = anew.kept()
    same = restored.keys() == saved.keys() and all(torch.equal(restored[k], saved[k]) for k in saved)
    take_steps(anew, steps[middle:], first=middle)
    made = sum(not step.skipped for step in steps)
    same = same and whole.updates == anew.updates == made
    return same, all(torch.equal(whole.kept()[k], anew.kept()[k]) for k in whole.kept())


@QUICK
@given(training=trainings(1, 2))
def test_owners_resume_from_their_state_to_the_last_bit(pools, training):
    assert pools(2).run(resume, *training) == [(True, True)] * 2


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(training=trainings(2, 2))
def test_trainings_repeat_to_the_last_bit(pools, training):
    vocabulary, steps = training
    first, second = (pools(4).run(train, vocabulary, 2, steps) for _ in range(2))
    for (rows, master, _), (rows_again, master_again, _) in zip(first, second, strict=True):
        assert master.tobytes() == master_again.tobytes()
        assert [r.tobytes() for r in rows] == [r.tobytes() for r in rows_again]


def ask_beyond(vocabulary, ids):
    tables = owned_tables(vocabulary, 1)
    try:
        fetch_rows(tables, ids)
    except IndexError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("ids", "span"),
    [([2, 7], r"2..7"), ([-1, 3], r"-1..3")],
    ids=["in the padding of the last owner", "negative"],
)
def test_an_id_beyond_the_vocabulary_is_named(pools, ids, span):
    # 7 rows over 2 owners: row 7 exists as padding, and must not be served.
    for message in pools(2).run(ask_beyond, 7, ids):
        assert f"token ids span {span}, but the memory tables have 7 rows" in message
