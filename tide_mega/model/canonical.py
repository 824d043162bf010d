"""Canonical tensors: one name and shape for every weight, and the boxes of them that a process holds.

Names and shapes are those of `tide_mega.model.reference`, whatever the topology. Initialising, comparing, saving
and loading all use this one mapping.

Dimensions: V vocabulary, D hidden size, F feed-forward size, K blocks, C head size, Q query width of a group.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from tide_mega.config.schema import ModelConfig
from tide_mega.model.stage import TideStage

TABLES, GAINS = "memory.tables", "memory.gains"


@dataclass(frozen=True)
class Shard:
    """Position of a process in the group that splits a tensor."""

    rank: int
    size: int

    def slice(self, total: int) -> tuple[int, int]:
        """Return this process's range of `total` rows (or columns)."""
        each = total // self.size
        return self.rank * each, (self.rank + 1) * each


@dataclass(frozen=True)
class Box:
    """A box of a canonical tensor: `size` elements along each dimension, starting at `offset`."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class LocalWeight:
    """A weight of this process: boxes of canonical tensors, stacked along its first dimension."""

    tensor: Tensor
    boxes: tuple[Box, ...]
    """Empty for a placeholder weight, which stays 0."""
    is_copy: bool = False
    """Whether another process of the same replica holds the same values and is responsible for them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole weight, which ZeRO-3 leaves empty between passes."""
        return (sum(box.size[0] for box in self.boxes), *self.boxes[0].size[1:])


def local_weights(stage: TideStage, config: ModelConfig) -> Iterator[LocalWeight]:
    """Yield the boxes of canonical tensors that each parameter of this process holds.

    The tables are one tensor [V, K, D] here, and the gains one of [K, D]. Rows owned outside the model are not
    among the parameters: owner g of G has rows g, g + G, ...
    """
    tensor = Shard(stage.groups.tensor_rank, stage.groups.tensor_size)
    cut = _Cut(config, tensor)
    K, D, V = stage.num_blocks, config.hidden_size, config.vocab_size
    vocab_part = cut.rows(V)
    for chunk in stage.transformers:
        if chunk.pre_process:
            yield LocalWeight(
                chunk.embedding.word_embeddings.weight,
                (cut.box("embedding.weight", (V, D), rows=vocab_part),),
            )
        for layer in chunk.decoder.layers:
            yield from _layer_weights(layer, config, K, cut)
        if chunk.decoder.final_layernorm is not None:
            yield cut.replicated(chunk.decoder.final_layernorm.weight, "final_norm.weight", (D,))
        if chunk.output_weight is not None:
            name = "embedding.weight" if config.tie_embeddings else "output.weight"
            box = cut.box(name, (V, D), rows=vocab_part)
            yield LocalWeight(chunk.output_weight, (box,), is_copy=config.tie_embeddings)
    if stage.absent_tables is not None:
        yield LocalWeight(stage.absent_tables, ())
    if (blocks := stage.memory.blocks) is not None:
        if blocks.tables_WKD is not None:
            yield LocalWeight(blocks.tables_WKD, (cut.box(TABLES, (V, K, D), rows=vocab_part),))
        yield cut.replicated(blocks.gains_KD, GAINS, (K, D))


@dataclass(frozen=True)
class _Cut:
    """Builds the boxes of one tensor-parallel rank."""

    config: ModelConfig
    tensor: Shard

    def rows(self, total: int) -> tuple[int, int]:
        return self.tensor.slice(total)

    def box(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
    ) -> Box:
        """Return the box of rows or columns first..last of a tensor; all of them by default."""
        bounds = [(0, n) for n in shape]
        if rows is not None:
            bounds[0] = rows
        if columns is not None:
            bounds[1] = columns
        return Box(name, shape, tuple(a for a, _ in bounds), tuple(b - a for a, b in bounds))

    def replicated(self, weight: Tensor, name: str, shape: tuple[int, ...]) -> LocalWeight:
        return LocalWeight(weight, (self.box(name, shape),), is_copy=self.tensor.rank > 0)


def _layer_weights(
    layer: TransformerLayer, config: ModelConfig, num_blocks: int, cut: _Cut
) -> Iterator[LocalWeight]:
    """Yield a layer's weights; megatron fuses query, key and value group by group, and stacks gate and up."""
    name = f"layers.{layer.layer_number - 1}"
    D, ffn, groups = config.hidden_size, config.ffn_hidden_size, config.num_query_groups
    C = D // config.num_attention_heads
    Q = config.num_attention_heads // groups * C
    yield cut.replicated(layer.input_layernorm.weight, f"{name}.attention_norm.weight", (D,))
    fused = []
    for g in range(*cut.rows(groups)):
        for part, width in (("query", Q), ("key", C), ("value", C)):
            full = f"{name}.attention.{part}.weight"
            fused.append(cut.box(full, (groups * width, D), rows=(g * width, (g + 1) * width)))
    yield LocalWeight(layer.self_attention.linear_qkv.weight, tuple(fused))
    output = cut.box(f"{name}.attention.output.weight", (D, D), columns=cut.rows(D))
    yield LocalWeight(layer.self_attention.linear_proj.weight, (output,))
    yield cut.replicated(layer.pre_mlp_layernorm.weight, f"{name}.ffn_norm.weight", (D,))
    gate_and_up = [
        cut.box(f"{name}.ffn.{part}.weight", (ffn, D), rows=cut.rows(ffn)) for part in ("gate", "up")
    ]
    yield LocalWeight(layer.mlp.linear_fc1.weight, tuple(gate_and_up))
    down = cut.box(f"{name}.ffn.down.weight", (D, ffn), columns=cut.rows(ffn))
    yield LocalWeight(layer.mlp.linear_fc2.weight, (down,))
    if layer.router_JD is not None:
        shape = (num_blocks + 1, D)
        yield cut.replicated(layer.router_JD, f"{name}.router.weight", shape)
