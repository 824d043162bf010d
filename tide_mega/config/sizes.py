"""Sizes that follow from the configuration alone: parameters, FLOPs, replicas and micro-batches.

Symbols: V vocabulary, d hidden size, L layers, K memory blocks, f FFN width, T sequence length, h attention
heads, g key/value heads. No matrix has a bias, and a head has d / h channels.
"""

from dataclasses import dataclass

from tide_mega.config.schema import MemoryConfig, ModelConfig, TideConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by kind, over the whole model (no kind is counted twice)."""

    embedding: int
    output: int
    """Zero if the output layer shares the embedding's matrix."""
    attention: int
    mlp: int
    norms: int
    routers: int
    tables: int
    memory_gains: int
    output_product: int
    """V d: what the output layer multiplies by, tied or not."""

    @property
    def base(self) -> int:
        """Parameters of the same model at K = 0."""
        return self.embedding + self.output + self.attention + self.mlp + self.norms

    @property
    def total(self) -> int:
        """All parameters, memory included."""
        return self.base + self.routers + self.tables + self.memory_gains

    @property
    def matmul(self) -> int:
        """Parameters by which a token is multiplied; the output matrix counts once, tied or not."""
        return self.attention + self.mlp + self.routers + self.output_product


def count_parameters(model: ModelConfig, memory: MemoryConfig) -> ParameterCount:
    """Count the parameters of a LLaMA-style model with memory (paper section 3).

    - embedding V d; output V d unless tied
    - attention, a layer: queries d d, keys and values d (d / h) g each, output d d
    - SwiGLU MLP, a layer: 3 d f
    - RMSNorm gains: 2 d a layer and d at the end
    - routers (K > 0): (K + 1) d a layer; tables: K V d; gains of the tables' norms: K d
    """
    d, layers, blocks = model.hidden_size, model.num_layers, memory.num_blocks
    key_value_size = d // model.num_attention_heads * model.num_query_groups
    return ParameterCount(
        embedding=model.vocab_size * d,
        output=0 if model.tie_embeddings else model.vocab_size * d,
        attention=layers * (2 * d * d + 2 * d * key_value_size),
        mlp=layers * 3 * d * model.ffn_hidden_size,
        norms=(2 * layers + 1) * d,
        routers=layers * (blocks + 1) * d if blocks > 0 else 0,
        tables=blocks * model.vocab_size * d,
        memory_gains=blocks * d,
        output_product=model.vocab_size * d,
    )


def flops_per_token(model: ModelConfig, memory: MemoryConfig, seq_length: int) -> int:
    """Return the FLOPs of forward and backward for one token: 6 P + 12 L d T.

    P counts the parameters of matrix products: attention, MLP, routers and the output layer (once, even if
    tied). The second term is the two products of attention in the convention of PaLM (arXiv 2204.02311, appendix
    B), which counts full attention and not its causal half. The input embedding and the memory tables are left
    out, since a lookup multiplies nothing; so is the element-wise work of norms and of the mix. Recomputation is
    not counted.
    """
    products = count_parameters(model, memory).matmul
    return 6 * products + 12 * model.num_layers * model.hidden_size * seq_length


def data_parallel_size(config: TideConfig, world_size: int) -> int:
    """Return the number of replicas of the model: `world_size` / (tensor x pipeline)."""
    return world_size // (config.parallel.tensor * config.parallel.pipeline)


def microbatches_per_step(config: TideConfig, world_size: int) -> int:
    """Return the micro-batches of one data-parallel rank in an optimizer step (gradient accumulation)."""
    replicas = max(1, data_parallel_size(config, world_size))
    return config.trainer.global_batch_size // (config.trainer.micro_batch_size * replicas)
