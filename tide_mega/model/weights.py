"""One name and shape for every weight, whatever the topology: initial values and shards.

The canonical names and shapes are those of `tide_mega.model.reference`, except that the tables and the
gains of the memory are addressed block by block. Each canonical tensor has its own random stream, so initial
weights depend on the seed alone: not on tensor-, pipeline- or data-parallel sizes, and the base weights of a
TIDE model equal those of its baseline.

Shapes: V vocabulary, D hidden size, F feed-forward size, K blocks, C head size.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from tide_mega.config.schema import MemoryConfig, ModelConfig
from tide_mega.model.stage import TideStage

ROW_BLOCK = 8192
"""Rows drawn from one random stream: an owner of part of a table draws only the blocks it needs."""

Fetch = Callable[[str, int, int], Tensor]
"""(canonical name, first row, last row) -> those rows of the canonical tensor."""


@dataclass(frozen=True)
class Shard:
    """Where a process is within the groups that split a tensor."""

    rank: int
    size: int

    def slice(self, total: int) -> tuple[int, int]:
        """Return this process's rows (or columns) of `total`."""
        each = total // self.size
        return self.rank * each, (self.rank + 1) * each


def local_tensors(stage: TideStage, config: ModelConfig, fetch: Fetch) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair every weight of this process with its values, cut from the canonical tensors.

    Weights are the stage's parameters, and the master rows of tables owned outside the model.
    """
    tensor = Shard(stage.groups.tensor_rank, stage.groups.tensor_size)
    D, V = config.hidden_size, config.vocab_size
    for chunk in stage.transformers:
        if chunk.pre_process:
            yield chunk.embedding.word_embeddings.weight, fetch("embedding.weight", *tensor.slice(V))
        for layer in chunk.decoder.layers:
            yield from _layer_tensors(layer, config, tensor, fetch)
        if chunk.decoder.final_layernorm is not None:
            yield chunk.decoder.final_layernorm.weight, fetch("final_norm.weight", 0, D)
        if chunk.output_weight is not None:
            name = "embedding.weight" if config.tie_embeddings else "output.weight"
            yield chunk.output_weight, fetch(name, *tensor.slice(V))
    if stage.absent_tables is not None:
        yield stage.absent_tables, torch.zeros(1)
    if stage.memory is not None:
        yield _tables(stage, V, fetch)
        blocks = range(stage.num_blocks)
        yield stage.memory.gains_KD, torch.stack([fetch(f"memory.gains.{k}", 0, D) for k in blocks])


def _tables(stage: TideStage, vocab_size: int, fetch: Fetch) -> tuple[Tensor, Tensor]:
    """Contiguous rows of a tensor shard; or every n-th row of an owner, 0 beyond the vocabulary."""
    group, blocks = stage.groups.memory, range(stage.num_blocks)
    if stage.owned is None:
        assert stage.memory is not None and stage.memory.tables_WKD is not None
        first, last = Shard(group.rank(), group.size()).slice(vocab_size)
        rows = [fetch(f"memory.tables.{k}", first, last) for k in blocks]
        return stage.memory.tables_WKD, torch.stack(rows, dim=1)
    master_WKD = stage.owned.master_WKD
    values_WKD = torch.zeros_like(master_WKD, requires_grad=False, device="cpu")
    for k in blocks:
        row = 0
        for first in range(0, vocab_size, ROW_BLOCK):
            block_RD = fetch(f"memory.tables.{k}", first, min(first + ROW_BLOCK, vocab_size))
            own_RD = block_RD[(group.rank() - first) % group.size() :: group.size()]
            values_WKD[row : row + len(own_RD), k] = own_RD
            row += len(own_RD)
    return master_WKD, values_WKD


def _layer_tensors(
    layer: TransformerLayer, config: ModelConfig, tensor: Shard, fetch: Fetch
) -> Iterator[tuple[Tensor, Tensor]]:
    name = f"layers.{layer.layer_number - 1}"
    D, ffn = config.hidden_size, config.ffn_hidden_size
    C = D // config.num_attention_heads
    yield layer.input_layernorm.weight, fetch(f"{name}.attention_norm.weight", 0, D)
    # megatron keeps, for each query group, its query heads, then its key head, then its value head.
    heads = config.num_attention_heads // config.num_query_groups
    pieces = []
    for group in range(*tensor.slice(config.num_query_groups)):
        query_rows = group * heads * C, (group + 1) * heads * C
        pieces.append(fetch(f"{name}.attention.query.weight", *query_rows))
        pieces.append(fetch(f"{name}.attention.key.weight", group * C, (group + 1) * C))
        pieces.append(fetch(f"{name}.attention.value.weight", group * C, (group + 1) * C))
    yield layer.self_attention.linear_qkv.weight, torch.cat(pieces)
    first, last = tensor.slice(D)
    yield (
        layer.self_attention.linear_proj.weight,
        fetch(f"{name}.attention.output.weight", 0, D)[:, first:last],
    )
    yield layer.pre_mlp_layernorm.weight, fetch(f"{name}.ffn_norm.weight", 0, D)
    first, last = tensor.slice(ffn)
    gate_and_up = [fetch(f"{name}.ffn.{part}.weight", first, last) for part in ("gate", "up")]
    yield layer.mlp.linear_fc1.weight, torch.cat(gate_and_up)
    yield layer.mlp.linear_fc2.weight, fetch(f"{name}.ffn.down.weight", 0, D)[:, first:last]
    if layer.router_JD is not None:
        yield layer.router_JD, fetch(f"{name}.router.weight", 0, layer.router_JD.size(0))


class InitialWeights:
    """The canonical tensors at step 0.

    Matrices ~ N(0, init_std), the two projections back into the residual stream of each layer
    ~ N(0, init_std / sqrt(2 L)), tables ~ N(0, table_init_std), routers ~ N(0, router_init_std), norms' gains
    1, the memory's gains `gain_init`.
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
    """Fill this process's weights with their share of the initial ones."""
    load(stage, config, InitialWeights(config, memory, seed).rows)


@torch.no_grad()
def load(stage: TideStage, config: ModelConfig, fetch: Fetch) -> None:
    """Fill this process's weights with their share of canonical tensors.

    Raises:
        RuntimeError: a parameter has no canonical counterpart, so it would keep arbitrary memory.
    """
    filled = set()
    for weight, values in local_tensors(stage, config, fetch):
        weight.copy_(values)
        filled.add(id(weight))
    forgotten = [name for name, parameter in stage.named_parameters() if id(parameter) not in filled]
    if forgotten:
        raise RuntimeError(f"no initial value is defined for {', '.join(forgotten)}")
