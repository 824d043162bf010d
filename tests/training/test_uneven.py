"""Trainings in which ranks differ: one alone sees a bad gradient, one reads a single token type.

No rank may wait for what another does not do.
"""

import pytest
import torch

from tests.support.runs import curve, tiny, train_here
from tests.support.slow import quick_and_slow
from tide_mega.data.index import DatasetIndex
from tide_mega.data.loader import TokenBatch
from tide_mega.parallel.groups import World
from tide_mega.training.trainer import DivergedError, Trainer

OWNERS = "memory.owners=tensor_data"
TYPE = 7
"""The one token type that some microbatches consist of."""


def weights(trainer):
    """Everything a skipped step must leave alone."""
    masters = {name: trainer.engine.master_weight(p) for name, p in trainer.stage.named_parameters()}
    if trainer.stage.memory.owned is not None:
        masters |= {f"owned {name}": value for name, value in trainer.stage.memory.owned.kept().items()}
    return {name: tensor.detach().clone() for name, tensor in masters.items()}


def train_poisoned(config, place, bad_rank, bad_step):
    """Make the gradient of one rank NaN in one step; return (error, steps done, whether weights stayed)."""
    world = World.from_environment()
    trainer = Trainer(config, world)
    before = {}
    update = trainer.guard.update

    def hook(gradient):
        return gradient * float("nan") if trainer.state.step == bad_step else gradient

    def spoilt(*arguments, **values):
        if trainer.state.step == bad_step:
            before.update(weights(trainer))
            if place == "table" and world.rank == bad_rank:
                gradient_WKD = trainer.stage.memory.owned.gradient_WKD
                row = int(gradient_WKD.abs().sum((1, 2)).argmax())  # one that the step has read
                gradient_WKD[row, 0, 0] = float("inf")
        return update(*arguments, **values)

    trainer.guard.update = spoilt
    if place == "layer" and world.rank == bad_rank:
        trainer.stage.transformers[-1].decoder.layers[-1].mlp.linear_fc1.weight.register_hook(hook)
    try:
        trainer.run()
    except DivergedError as error:
        after = weights(trainer)
        same = after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
        clean = trainer.stage.memory.owned is None or not trainer.stage.memory.owned.gradient_WKD.any()
        return str(error), trainer.state.step, same and clean
    finally:
        trainer.close()
    return None


BAD_GRADIENTS = [
    (place, overrides, bad_rank)
    for place, overrides in (
        ("layer", ()),
        ("layer", ("parallel.zero_stage=2",)),
        ("layer", ("parallel.zero_stage=3",)),
        ("layer", ("parallel.pipeline=2",)),
        ("layer", ("parallel.tensor=2",)),
        ("layer", (OWNERS,)),
        ("layer", (OWNERS, "trainer.precision=bf16")),
        ("layer", (OWNERS, "optim.clip_grad=0")),
        ("table", (OWNERS,)),
        ("table", (OWNERS, "optim.clip_grad=0")),
        ("table", (OWNERS, "parallel.tensor=2", "memory.exchange_ahead=true")),
    )
    for bad_rank in (0, 1)
]
QUICK_GRADIENTS = [("layer", (), 1), ("layer", ("parallel.pipeline=2",), 0), ("table", (OWNERS,), 1)]


@pytest.mark.parametrize(
    ("place", "overrides", "bad_rank"),
    quick_and_slow(QUICK_GRADIENTS, BAD_GRADIENTS),
    ids=lambda value: " ".join(value) or "replicated" if isinstance(value, tuple) else str(value),
)
def test_a_bad_gradient_on_one_rank_stops_all_at_the_same_step(
    pools, tiny_data, tmp_path, place, overrides, bad_rank
):
    config = tiny(tiny_data, tmp_path, "faults.max_skipped_in_a_row=1", *overrides, world_size=2)
    results = pools(2).run(train_poisoned, config, place, bad_rank, 4)
    for message, steps, unchanged in results:
        assert "the gradient is not finite at step 5" in message
        assert steps == 5
        assert unchanged, "a skipped step changed weights"
    kept = [p.name for p in sorted((tmp_path / "tiny" / "checkpoints").glob("step-*"))]
    assert kept == ["step-00000003"]


def train_monotone(config, first_monotone):
    """Train with all microbatches of a step from the n-th on, over all replicas, of one token type."""
    trainer = Trainer(config, World.from_environment())
    next_step = trainer.batches.next_step
    offset = trainer.groups.data_rank * trainer.accumulation

    def replaced(sequences):
        return [
            batch if offset + i < first_monotone else TokenBatch(*(torch.full_like(x, TYPE) for x in batch))
            for i, batch in enumerate(next_step(sequences))
        ]

    trainer.batches.next_step = replaced
    try:
        trainer.run()
        return trainer.state.step
    finally:
        trainer.close()


MONOTONE = [
    (overrides, first_monotone)
    for overrides in (
        (OWNERS,),
        (OWNERS, "memory.exchange_ahead=true"),
        (OWNERS, "memory.window=1"),
        (OWNERS, "parallel.tensor=2", "parallel.sequence_parallel=true"),
        ("parallel.pipeline=2",),
    )
    for first_monotone in (2, 0)
]


@pytest.mark.parametrize(
    ("overrides", "first_monotone"),
    quick_and_slow([((OWNERS,), 2), (("parallel.pipeline=2",), 0)], MONOTONE),
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else f"from microbatch {value}",
)
def test_a_replica_of_one_token_type_trains_as_in_one_process(
    pools, tiny_data, tmp_path, overrides, first_monotone
):
    alone = tiny(tiny_data, tmp_path / "alone")
    assert pools(1).run(train_monotone, alone, first_monotone) == [6]
    together = tiny(tiny_data, tmp_path / "together", *overrides, world_size=2)
    assert pools(2).run(train_monotone, together, first_monotone) == [6, 6]
    expected, records = (curve(tmp_path / name / "tiny" / "metrics.jsonl") for name in ("alone", "together"))
    for record, wanted in zip(records, expected, strict=True):
        if record["kind"] == "weights":
            continue
        assert record["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        if record["kind"] == "train":
            assert record["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
            assert record["grad_norm_tables"] == pytest.approx(wanted["grad_norm_tables"], rel=1e-3)


@pytest.mark.slow
def test_a_vocabulary_that_owners_do_not_divide_trains_as_in_one_process(pools, tiny_data, tmp_path):
    odd = DatasetIndex.load(tiny_data).tokenizer.vocab_size | 1
    overrides = (f"model.vocab_size={odd}", "trainer.eval_sequences=9")
    assert pools(1).run(train_here, tiny(tiny_data, tmp_path / "alone", *overrides)) == [6]
    together = tiny(tiny_data, tmp_path / "together", *overrides, OWNERS, world_size=2)
    assert pools(2).run(train_here, together) == [6, 6]
    expected, records = (curve(tmp_path / name / "tiny" / "metrics.jsonl") for name in ("alone", "together"))
    for record, wanted in zip(records, expected, strict=True):
        if record["kind"] == "weights":
            continue
        assert record["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def test_a_step_moves_the_ids_rows_and_gradients_that_its_plan_says(pools, tiny_data, tmp_path):
    # No evaluation in between: rows fetched and gradients returned are of the same plans.
    config = tiny(tiny_data, tmp_path, OWNERS, "trainer.eval_every=0", world_size=2)
    assert pools(2).run(train_here, config) == [6, 6]
    row_bytes = config.memory.num_blocks * config.model.hidden_size * 4
    for record in curve(tmp_path / "tiny" / "metrics.jsonl"):
        if record["kind"] == "train":
            ids, rows, gradients = (record["traffic"][kind] for kind in ("ids", "rows", "row gradients"))
            assert gradients["sent"] == rows["received"] == ids["sent"] // 8 * row_bytes > 0
            assert gradients["received"] == rows["sent"] == ids["received"] // 8 * row_bytes > 0
