"""What DeepSpeed and the fp32 sums really hold when a step's gradient is whole, against the estimate."""

import pytest
import torch

from tests.support.runs import tiny
from tide_mega.config.device_memory import backward_gradients, stage_parameters
from tide_mega.parallel.engine_settings import EngineOptions, deepspeed_config
from tide_mega.parallel.groups import World
from tide_mega.training.trainer import Trainer


def held_after_the_last_backward(config):
    """Make a step in a pool's worker; return bytes of gradients before the reduction, and of weights' buckets."""
    trainer = Trainer(config, World.from_environment())
    engine, held = trainer.engine, {}
    finish = engine._accumulator.finish

    def look():
        gradients = [p.grad for p in trainer.stage.parameters() if p.grad is not None]
        sums = list(engine._accumulator._sums.values())
        held["gradients"] = sum(t.numel() * t.element_size() for t in (*gradients, *sums))
        finish()

    engine._accumulator.finish = look
    sound, buckets = torch.empty, []

    def empty(*sizes, **words):
        if len(sizes) == 1 and isinstance(sizes[0], int):
            buckets.append(sizes[0])
        return sound(*sizes, **words)

    torch.empty = empty
    try:
        trainer.run()
    finally:
        torch.empty = sound
        trainer.close()
    return held["gradients"], max(buckets, default=0)


WORDS = ("trainer.max_steps=1", "optim.warmup_steps=0", "trainer.eval_sequences=2", "memory=none")


@pytest.mark.parametrize(
    ("stage", "precision", "micro"),
    [(1, "bf16", 2), (1, "bf16", 4), (2, "bf16", 2), (3, "bf16", 2), (1, "fp32", 2), (3, "fp32", 4)],
)
def test_gradients_are_whole_at_every_stage_and_widened_where_counted(
    pools, tiny_data, tmp_path, stage, precision, micro
):
    words = (f"parallel.zero_stage={stage}", f"trainer.precision={precision}")
    config = tiny(tiny_data, tmp_path, *WORDS, *words, f"trainer.micro_batch_size={micro}", world_size=2)
    parameters = stage_parameters(config, 0)
    counted = backward_gradients(config, 2, parameters)
    if precision == "bf16" and micro == 2 and stage < 3:
        counted -= 2 * parameters.largest  # of the weight in hand, which is gone by then
    for gradients, bucket in pools(2).run(held_after_the_last_backward, config):
        assert gradients == counted
        if stage < 3:
            assert bucket == parameters.total


@pytest.mark.parametrize(("elements", "bucket"), [(10, 10), (2 * 10**9, 500_000_000), (0, 1)])
def test_the_bucket_is_no_larger_than_the_weights(elements, bucket):
    options = EngineOptions(zero_stage=1, precision="bf16", clip_grad=1.0, micro_batch_size=1, accumulation=1)
    assert deepspeed_config(options, 4, elements)["zero_optimization"]["reduce_bucket_size"] == bucket
