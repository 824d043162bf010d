"""Initial weights, and filling a process's weights from canonical tensors.

Names are those of `tide_mega.model.canonical`, except that tables and gains are requested block by block. Each
canonical tensor has its own random stream, so initial weights depend on the seed alone and not on tensor-,
pipeline- or data-parallel sizes, and the base weights of a TIDE model equal those of its baseline.

Dimensions: V vocabulary, K blocks, D width, W rows of an owner, R rows of a block of the random stream; L layers.
"""

import hashlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tide_mega.config.schema import MemoryConfig, ModelConfig
from tide_mega.memory.owned import OwnedTables
from tide_mega.memory.ownership import owned_within
from tide_mega.model.canonical import GAINS, TABLES, Box, local_weights
from tide_mega.model.stage import TideStage

ROW_BLOCK = 8192
"""Rows drawn from one random stream, so that an owner of part of a table draws only the blocks it needs."""

Fetch = Callable[[str, int, int], Tensor]
"""(canonical name, first row, last row) -> those rows of the canonical tensor."""


def local_tensors(stage: TideStage, config: ModelConfig, fetch: Fetch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every weight of this process with its values, cut from the canonical tensors.

    Weights are the stage's parameters and the master rows of tables owned outside the model. `fetch` serves the
    memory block by block, as `memory.tables.0`, `memory.gains.0` and so on.
    """
    for weight in local_weights(stage, config):
        values = [_values(box, stage.num_blocks, fetch) for box in weight.boxes]
        yield weight.tensor, torch.cat(values) if values else torch.zeros(1)
    if (owned := stage.memory.owned) is not None:
        yield owned.master_WKD, _owned_rows(owned, stage.num_blocks, config.vocab_size, fetch)


def _values(box: Box, num_blocks: int, fetch: Fetch) -> Tensor:
    first, last = box.offset[0], box.offset[0] + box.size[0]
    if box.name == TABLES:
        return torch.stack([fetch(f"{TABLES}.{k}", first, last) for k in range(num_blocks)], dim=1)
    if box.name == GAINS:
        return torch.stack([fetch(f"{GAINS}.{k}", 0, box.size[1]) for k in range(first, last)])
    values = fetch(box.name, first, last)
    return values if values.ndim == 1 else values[:, box.offset[1] : box.offset[1] + box.size[1]]


def _owned_rows(owned: OwnedTables, num_blocks: int, vocab_size: int, fetch: Fetch) -> Tensor:
    """Return an owner's rows, every n-th of the tables [W, K, D]; 0 beyond the vocabulary."""
    group = owned.group
    values_WKD = torch.zeros_like(owned.master_WKD, requires_grad=False, device="cpu")
    for k in range(num_blocks):
        row = 0
        for first in range(0, vocab_size, ROW_BLOCK):
            block_RD = fetch(f"{TABLES}.{k}", first, min(first + ROW_BLOCK, vocab_size))
            own_RD = block_RD[owned_within(group.rank(), group.size(), first)]
            values_WKD[row : row + len(own_RD), k] = own_RD
            row += len(own_RD)
    return values_WKD


class InitialWeights:
    """The canonical tensors at step 0.

    Matrices ~ N(0, init_std), the two projections of each layer back into the residual stream
    ~ N(0, init_std / sqrt(2 L)), tables ~ N(0, table_init_std), routers ~ N(0, router_init_std) (second
    argument: the standard deviation). Gains of norms are 1, gains of the memory `gain_init`.
    """

    def __init__(self, model: ModelConfig, memory: MemoryConfig, seed: int) -> None:
        self.model, self.memory, self.seed = model, memory, seed

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows first..last of the canonical tensor, fp32."""
        if "norm" in name:
            return torch.ones(last - first)
        if "gains" in name:
            return torch.full((last - first,), self.memory.gain_init)
        blocks = range(first // ROW_BLOCK, math.ceil(last / ROW_BLOCK))
        drawn = torch.cat([self._block(name, block) for block in blocks])
        start = first - blocks[0] * ROW_BLOCK
        return drawn[start : start + last - first] * self._std(name)

    def _block(self, name: str, block: int) -> Tensor:
        key = hashlib.blake2b(f"{self.seed}/{name}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little", signed=True))
        columns = self.model.ffn_hidden_size if ".down." in name else self.model.hidden_size
        return torch.randn(self._block_rows(name, block), columns, generator=generator)

    def _block_rows(self, name: str, block: int) -> int:
        model, groups = self.model, self.model.num_query_groups
        head_size = model.hidden_size // model.num_attention_heads
        total = {
            "key": groups * head_size,
            "value": groups * head_size,
            "gate": model.ffn_hidden_size,
            "up": model.ffn_hidden_size,
            "query": model.hidden_size,
            "output": model.hidden_size,
            "down": model.hidden_size,
            "router": self.memory.num_blocks + 1,
        }.get(name.split(".")[-2] if name.startswith("layers.") else "", model.vocab_size)
        return min(ROW_BLOCK, total - block * ROW_BLOCK)

    def _std(self, name: str) -> float:
        if ".router." in name:
            return self.memory.router_init_std
        if ".tables." in name:
            return self.memory.table_init_std
        if name.endswith(("attention.output.weight", "ffn.down.weight")):
            return self.model.init_std / math.sqrt(2 * self.model.num_layers)
        return self.model.init_std


def initialise(stage: TideStage, config: ModelConfig, memory: MemoryConfig, seed: int) -> None:
    """Fill this process's weights with their share of the initial weights."""
    load(stage, config, InitialWeights(config, memory, seed).rows)


@torch.no_grad()
def load(stage: TideStage, config: ModelConfig, fetch: Fetch) -> None:
    """Fill this process's weights with their share of the canonical tensors.

    Raises:
        RuntimeError: a parameter has no canonical counterpart and would stay uninitialised.
    """
    filled = set()
    for weight, values in local_tensors(stage, config, fetch):
        weight.copy_(values)
        filled.add(id(weight))
    forgotten = [name for name, parameter in stage.named_parameters() if id(parameter) not in filled]
    if forgotten:
        raise RuntimeError(f"no initial value is defined for {', '.join(forgotten)}")
