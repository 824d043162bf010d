"""A bad value on one rank alone: every rank skips the step, and nothing of model or optimizer has moved."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from tests.support.runs import tiny
from tests.support.slow import quick_and_slow
from tide_mega.metrics.jsonl import read_metrics
from tide_mega.parallel.groups import World
from tide_mega.training.trainer import Trainer

BAD_STEP, LAST = 3, 4


@dataclass(frozen=True)
class Case:
    world: int
    overrides: tuple[str, ...]


CASES = {
    **{
        f"data parallel, ZeRO-{stage}, {precision}": Case(
            2, (f"parallel.zero_stage={stage}", "memory.owners=tensor", f"trainer.precision={precision}")
        )
        for stage in (1, 2, 3)
        for precision in ("fp32", "bf16")
    },
    "owners": Case(2, ("memory.owners=tensor_data",)),
    "owners, ZeRO-2, bf16, ahead": Case(
        2,
        (
            "memory.owners=tensor_data",
            "parallel.zero_stage=2",
            "trainer.precision=bf16",
            "memory.exchange_ahead=true",
        ),
    ),
    "tensor, bf16": Case(2, ("parallel.tensor=2", "memory.owners=tensor", "trainer.precision=bf16")),
    "tensor, sequence, owners": Case(
        2, ("parallel.tensor=2", "parallel.sequence_parallel=true", "memory.owners=tensor_data")
    ),
    "pipeline": Case(2, ("parallel.pipeline=2", "memory.owners=tensor")),
    "pipeline, bf16, owners": Case(
        2, ("parallel.pipeline=2", "memory.owners=tensor_data", "trainer.precision=bf16")
    ),
}


def snapshot(trainer):
    """Every number of model, master weights, moments and Adam's step counts on this rank."""
    optimizer = trainer.engine._engine.optimizer
    # ZeRO-3 gathers parameters and lets go of them; its partitions are what stays.
    kept = {f"parameter {n}": getattr(p, "ds_tensor", p) for n, p in trainer.stage.named_parameters()}
    for n, group in enumerate(optimizer.optimizer.param_groups):
        kept |= {f"master {n}.{m}": p for m, p in enumerate(group["params"])}
    moments = list(optimizer.optimizer.state.values())
    if trainer.stage.memory.owned is not None:
        kept["tables"] = trainer.stage.memory.owned.master_WKD
        moments += list(trainer.stage.memory.owned.optimizer.state.values())
    for n, state in enumerate(moments):
        kept |= {f"moment {n}.{name}": torch.as_tensor(value) for name, value in state.items()}
    return {name: tensor.detach().clone() for name, tensor in kept.items()}


def watch(config, spoil=None):
    """Train; return for each step the verdict's reason and what of the snapshot it changed."""
    trainer = Trainer(config, World.from_environment())
    seen = []
    update = trainer.guard.update

    def observed(engine, result, *args, **values):
        if spoil is not None and trainer.state.step + 1 == BAD_STEP:
            spoil(trainer)
        before = snapshot(trainer)
        verdict = update(engine, result, *args, **values)
        after = snapshot(trainer)
        if trainer.stage.memory.owned is not None:
            # Right after an update and a skip alike: what is left would be added to the next step's.
            assert not trainer.stage.memory.owned.gradient_WKD.any()
        changed = [name for name in after if name not in before or not torch.equal(before[name], after[name])]
        seen.append((verdict.reason, changed, all(tensor.isfinite().all() for tensor in after.values())))
        return verdict

    trainer.guard.update = observed
    try:
        trainer.run()
        return seen
    finally:
        trainer.close()


def check(pools, config, world, reason, *arguments):
    for rank, seen in enumerate(pools(world).run(watch, config, *arguments)):
        assert [step[0] for step in seen] == [None, None, reason, None], rank
        assert all(changed for _, changed, _ in (*seen[:2], seen[3])), rank
        assert seen[2][1] == [], rank
        assert all(finite for *_, finite in seen), rank


def config_of(tiny_data, root, case, *overrides):
    return tiny(
        tiny_data,
        root,
        f"trainer.max_steps={LAST}",
        "trainer.eval_every=0",
        "trainer.eval_sequences=2",
        "checkpoint.every=0",
        "checkpoint.at_end=false",
        *case.overrides,
        *overrides,
        world_size=case.world,
    )


QUICK = ["data parallel, ZeRO-1, fp32", "owners, ZeRO-2, bf16, ahead", "pipeline"]


@pytest.mark.parametrize(
    ("name", "fault"),
    quick_and_slow(
        [(name, "nan_grad@3:1") for name in QUICK],
        [(name, f"nan_grad@3:{rank}") for name in CASES for rank in (1, 0)],
    ),
)
def test_a_bad_gradient_on_one_rank_moves_nothing_anywhere(pools, tiny_data, tmp_path, name, fault):
    case = CASES[name]
    config = config_of(tiny_data, tmp_path, case, f"faults.inject=[{fault}]")
    check(pools, config, case.world, "gradient")


@pytest.mark.parametrize(
    "name", quick_and_slow(["owners"], ["data parallel, ZeRO-1, fp32", "owners", "tensor, bf16"])
)
def test_a_bad_loss_on_one_rank_is_named_left_out_and_counted(pools, tiny_data, tmp_path, name):
    case = CASES[name]
    config = config_of(tiny_data, tmp_path, case, "faults.inject=[nan_loss@3:0]", "logging.every=1")
    check(pools, config, case.world, "loss")
    records = read_metrics(tmp_path / "tiny" / "metrics.jsonl")
    records = [r for r in records if r["kind"] != "weights"]
    assert [(r["kind"], r["step"]) for r in records] == [
        ("train", 1),
        ("live", 1),
        ("train", 2),
        ("live", 2),
        ("event", 3),
        ("train", 3),
        ("live", 3),
        ("train", 4),
        ("live", 4),
        ("eval", 4),
    ]
    event, live = records[4], [r for r in records if r["kind"] == "live"]
    assert (event["event"], event["reason"], event["at_step"]) == ("skipped", "loss", 3)
    assert [sum(r["count_by_bin"].values()) for r in live] == [8 * 32, 8 * 32, 0, 8 * 32]
    assert [r["loss"] is None for r in live] == [False, False, True, False]
    assert [r["skipped_steps"] for r in records if r["kind"] == "train"] == [0, 0, 1, 1]
    assert records[7]["loss"] < 7
    assert records[7]["tokens"] == LAST * 8 * 32


def replicated_weight_of_the_last_rank(trainer):
    """Spoil one rank's copy of a gain that every tensor rank has: the norm looks at the first rank's alone."""
    if dist.get_rank() != dist.get_world_size() - 1:
        return
    optimizer = trainer.engine._engine.optimizer
    for group, parameters in (
        optimizer.params_in_partition.items()
        if isinstance(optimizer.params_in_partition, dict)
        else enumerate(optimizer.params_in_partition)
    ):
        for gradient, parameter in zip(optimizer.averaged_gradients[group], parameters, strict=False):
            if not getattr(parameter, "tensor_model_parallel", False) and parameter.dim() == 1:
                gradient.view(-1)[0] = float("inf")
                return
    raise AssertionError("no replicated weight here")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("owners", ["tensor", "tensor_data"])
def test_a_bad_value_in_one_copy_of_a_replicated_weight_is_seen(
    pools, tiny_data, tmp_path, owners, precision
):
    case = Case(2, ("parallel.tensor=2", f"memory.owners={owners}", f"trainer.precision={precision}"))
    config = config_of(tiny_data, tmp_path, case)
    check(pools, config, 2, "gradient", replicated_weight_of_the_last_rank)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.tensor=2", "memory.owners=tensor_data"),
        ("parallel.pipeline=2", "memory.owners=tensor_data", "trainer.precision=bf16"),
        ("parallel.tensor=2", "parallel.pipeline=2", "memory.owners=tensor"),
    ],
)
@pytest.mark.parametrize("rank", [0, 3])
def test_four_ranks_agree(pools, tiny_data, tmp_path, overrides, rank):
    case = Case(4, overrides)
    check(pools, config_of(tiny_data, tmp_path, case, f"faults.inject=[nan_grad@3:{rank}]"), 4, "gradient")
