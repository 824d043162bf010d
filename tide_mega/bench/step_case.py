"""A model under its engine with synthetic tokens, and one optimizer step of it: what the step benchmark times."""

import gc

import torch

from tide_mega.bench.ids import draw_ids
from tide_mega.bench.timing import Stopwatch
from tide_mega.config.schema import TideConfig
from tide_mega.data.batch import TokenBatch
from tide_mega.model.passes import compute_gradients
from tide_mega.parallel.device import Device
from tide_mega.parallel.groups import make_groups
from tide_mega.training.setup import build_engine, build_stage

REGIONS = ("gradients", "optimizer")


def draw_batches(config: TideConfig, accumulation: int, device: torch.device) -> list[TokenBatch]:
    """Microbatches of a step, ids by Zipf's law; the same for every K."""
    sequences, length = config.trainer.micro_batch_size, config.data.seq_length
    batches = []
    for number in range(accumulation):
        ids = draw_ids("zipf", sequences * (length + 1), config.model.vocab_size, seed=number)
        ids_BS = ids.view(sequences, length + 1).to(device)
        batches.append(TokenBatch(ids_BS[:, :-1].contiguous(), ids_BS[:, 1:].contiguous()))
    return batches


class StepCase:
    """Stage, engine and batches of one K."""

    def __init__(self, config: TideConfig, device: Device, accumulation: int) -> None:
        """Build all; `state_bytes` is what that allocated on a GPU."""
        before = _allocated(device)
        groups = make_groups(config.parallel, config.trainer.seed, config.memory.owners)
        self.config = config
        self.device = device
        self.stage = build_stage(config, groups, device)
        self.engine = build_engine(config, self.stage, device, accumulation)
        self.batches = draw_batches(config, accumulation, device.torch_device)
        self.state_bytes = _allocated(device) - before

    @property
    def router_in_norm(self) -> bool:
        """Whether the router shares the passes of the norm before it."""
        return self.stage.board.kernels.norm_router == "triton"

    def step(self, watch: Stopwatch) -> None:
        """Make one optimizer step; marks `REGIONS`."""
        config = self.config
        compute_gradients(self.engine, self.batches, config.trainer.z_loss, window=config.memory.window)
        watch.mark("gradients")
        self.engine.step(config.optim.lr)
        watch.mark("optimizer")

    def peak_bytes(self) -> int:
        """Most that a GPU's allocator held for this K in a step: its state, and what the step needs above it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step(Stopwatch(self.device.torch_device))
        torch.cuda.synchronize()
        return self.state_bytes + torch.cuda.max_memory_allocated() - before

    def close(self) -> None:
        """Free everything; the case cannot be used again."""
        self.engine.close()
        del self.engine, self.stage, self.batches
        gc.collect()
        if self.device.is_cuda:
            torch.cuda.empty_cache()


def _allocated(device: Device) -> int:
    return torch.cuda.memory_allocated() if device.is_cuda else 0
