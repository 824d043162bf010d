"""Bytes of device memory that a training step needs, term by term, from the configuration alone.

Memory peaks at one of three instants of a step: in a backward pass (`backward`), when the step's complete
gradient is reduced over data parallelism (`reduction`), and in the optimizer's update (`update`). What is held
at all of them is `state`. A device needs the state and the largest of the three; the fullest device belongs to
the first or the last pipeline stage.

The estimate is for GPU code: Triton kernels, fused norms, and attention that stores no scores. It leaves out the
CUDA context, the communication library's buffers and fragmentation of the allocator, 3 to 6 GB together, by
which `cluster.memory_gb` of the profiles is smaller than the memory of their cards.

Symbols: V vocabulary, d hidden size, L layers, K memory blocks, f FFN width, h heads, g key/value heads, n tokens
of a microbatch, e bytes of an element (2 in bf16, 4 in fp32), t tensor ranks, s = t under sequence parallelism,
else 1.
"""

import math
from dataclasses import dataclass

from tide_mega.config.schema import TideConfig
from tide_mega.config.sizes import count_parameters, data_parallel_size, microbatches_per_step

REDUCE_BUCKET = 500_000_000
"""Maximum number of elements that DeepSpeed reduces at a time."""
LIVE_PARAMETERS = 1_000_000_000
"""Maximum number of elements that DeepSpeed's ZeRO-3 keeps gathered."""
LOGIT_CHUNK_BYTES = 2**30
"""Maximum bytes of logits that exist at a time in the loss on a GPU: enough for efficient matrix products."""


@dataclass(frozen=True)
class StageParameters:
    """Elements on one device under DeepSpeed (without tables whose rows have one owner)."""

    dense: int
    """Parameters whose gradient each micro-batch adds to."""
    tables: int
    """Tables sharded over tensor parallelism, whose gradient comes once a step."""
    largest: int
    """The largest single weight among `dense`."""

    @property
    def total(self) -> int:
        """Both kinds."""
        return self.dense + self.tables


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device."""

    weights: int
    optimizer: int
    """fp32 master weights and two moments."""
    owned_rows: int
    """Rows with one owner: fp32 weight, gradient and two moments."""
    buffers: int
    """Persistent buffers of ZeRO-3."""
    gradients: int
    """During a backward pass: gradients of all micro-batches so far, and of the weight being processed."""
    activations: int
    loss: int
    """fp32 gradient of the output layer, gradient of the hidden states, and a chunk of logits."""
    rows: int
    """Rows of one reading of the memory, and their gradient."""
    reduction: int
    """While gradients are rounded and reduced, instead of the four above."""
    update: int
    """While the weights are updated, instead of the same four."""

    @property
    def state(self) -> int:
        """Bytes held at any time."""
        return self.weights + self.optimizer + self.owned_rows + self.buffers

    @property
    def backward(self) -> int:
        """Bytes that a backward pass adds to the state."""
        return self.gradients + self.activations + self.loss + self.rows

    @property
    def total(self) -> int:
        """Bytes at the fullest instant."""
        return self.state + max(self.backward, self.reduction, self.update)


def device_memory(config: TideConfig, world_size: int) -> DeviceMemory:
    """Estimate the bytes on the fullest of `world_size` devices."""
    last = config.parallel.pipeline - 1
    return max((_on_stage(config, world_size, stage) for stage in {0, last}), key=lambda memory: memory.total)


def state_bytes(config: TideConfig, world_size: int) -> int:
    """Return the bytes of weights, gradients and optimizer state alone, on the fullest device."""
    last = config.parallel.pipeline - 1

    def of_stage(stage: int) -> int:
        memory = _on_stage(config, world_size, stage)
        return memory.state + element_bytes(config) * stage_parameters(config, stage).total

    return max(of_stage(stage) for stage in {0, last})


def element_bytes(config: TideConfig) -> int:
    """Return e: bytes of a weight, a gradient or an activation."""
    return 2 if config.trainer.precision == "bf16" else 4


def stage_parameters(config: TideConfig, stage: int) -> StageParameters:
    """Count the elements that a device of a pipeline stage holds under DeepSpeed.

    Matrices and tables are divided by the tensor-parallel size; norms, routers and gains are replicated on every
    device of a stage. The first stage holds the embedding, the tables and their gains, the last one the output
    layer (if tied, a second copy of the embedding's matrix), and each an equal share of the layers.
    """
    count, parallel, model = count_parameters(config.model, config.memory), config.parallel, config.model
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    matrices = (count.attention + count.mlp) // parallel.pipeline
    whole = (count.norms - model.hidden_size + count.routers) // parallel.pipeline
    largest = 2 * model.hidden_size * model.ffn_hidden_size  # gate and up are one weight
    if is_first:
        matrices += count.embedding
        whole += count.memory_gains
        largest = max(largest, count.embedding)
    if is_last:
        matrices += count.output if is_first else count.output_product
        whole += model.hidden_size
        largest = max(largest, count.output_product)
    tables = count.tables if is_first and config.memory.owners == "tensor" else 0
    tensor = parallel.tensor
    return StageParameters(matrices // tensor + whole, tables // tensor, largest // tensor)


def widens(config: TideConfig, world_size: int) -> bool:
    """Return whether micro-batches are accumulated in fp32, beside bf16 weights."""
    several = microbatches_per_step(config, world_size) > 1
    return config.trainer.precision == "bf16" and several and config.parallel.zero_stage < 3


def backward_gradients(config: TideConfig, world_size: int, parameters: StageParameters) -> int:
    """Return the bytes of gradients at the end of a step's last backward pass.

    They are unsharded at every ZeRO stage: all micro-batches of a step are reduced at once, after the last. In
    bf16 with more than one micro-batch they take 4 bytes an element, plus one weight's bf16 gradient at a time;
    else e.
    """
    if widens(config, world_size):
        return 4 * parameters.dense + 2 * parameters.largest
    return element_bytes(config) * parameters.dense


def reduction_bytes(config: TideConfig, world_size: int, parameters: StageParameters) -> int:
    """Return the peak bytes from the last backward pass to the reduced gradient.

    First the fp32 sums are rounded: 4 and 2 bytes an element. Then DeepSpeed copies a bucket of gradients, and
    copies the bucket once more to reduce it, while this device's share (all of it without data parallelism) is
    collected in a third buffer.
    """
    replicas, element = max(1, data_parallel_size(config, world_size)), element_bytes(config)
    rounding = 4 * parameters.dense if widens(config, world_size) else 0
    buckets = (1 if config.parallel.zero_stage >= 3 else 2) * min(REDUCE_BUCKET, parameters.total)
    reducing = element * (buckets + parameters.total // replicas)
    return element * parameters.total + max(rounding, reducing)


def update_bytes(config: TideConfig, world_size: int, parameters: StageParameters) -> int:
    """Return the bytes of the optimizer's update: this device's share of the reduced gradient, also in fp32."""
    replicas = max(1, data_parallel_size(config, world_size))
    return (element_bytes(config) + 4) * parameters.total // replicas


def layer_bytes(config: TideConfig, *, recompute: str | None = None) -> int:
    """Return the bytes per token that a layer keeps from forward to backward, on one device.

    Without recompute, e times:

    - 4 d / s: input, its norm, the state after attention, its norm
    - (d + 2 d g / h) / t the product that queries, keys and values are cut from; (d + d g / h) / t queries and
      keys with their positions; d / t attention's output
    - 3 f / t: gate and up, and their SwiGLU (5 if it is not compiled)

    and 4 bytes times: 2 / s scales of the norms, h / t of attention's softmax, (K + 1) / s of the router's.

    Selective recompute keeps of attention the product, the output and, if a device has several groups, the
    queries cut out of it, and nothing within the MLP. Full recompute keeps the layer's input, d / s.
    """
    model, parallel, element = config.model, config.parallel, element_bytes(config)
    recompute = recompute or parallel.recompute
    d, heads, tensor = model.hidden_size, model.num_attention_heads, parallel.tensor
    sequence = tensor if parallel.sequence_parallel else 1
    if recompute == "full":
        return element * d // sequence
    keys = d // heads * model.num_query_groups
    scales = 2 + (config.memory.num_blocks + 1 if config.memory.num_blocks else 0)
    kept = 4 * d // sequence
    if recompute == "selective":
        copied = d if model.num_query_groups > tensor else 0
        return element * (kept + (2 * d + copied + 2 * keys) // tensor) + 4 * scales // sequence
    inside = (3 * d + 3 * keys + _swiglu(config) * model.ffn_hidden_size) // tensor
    return element * (kept + inside) + 4 * scales // sequence + 4 * heads // tensor


def _swiglu(config: TideConfig) -> int:
    return 3 if config.kernels.compile else 5


def working_bytes(config: TideConfig) -> int:
    """Return the bytes per token of the layer in its backward pass: recomputation and temporary gradients.

    Gradients: e (3 f / t + 4 d / s). Recomputed: a whole layer with full recompute, the larger of MLP and core
    attention with selective.
    """
    model, parallel, element = config.model, config.parallel, element_bytes(config)
    d, f, tensor = model.hidden_size, model.ffn_hidden_size, parallel.tensor
    sequence = tensor if parallel.sequence_parallel else 1
    gradients = element * (3 * f // tensor + 4 * d // sequence)
    if parallel.recompute == "full":
        return gradients + layer_bytes(config, recompute="none")
    keys = d // model.num_attention_heads * model.num_query_groups
    again = max(_swiglu(config) * f, 2 * d + keys) if parallel.recompute == "selective" else 0
    return gradients + element * again // tensor


def layers_in_flight(config: TideConfig, world_size: int, stage: int) -> int:
    """Return the maximum of layers times micro-batches whose activations a stage holds at once.

    A stage of the 1F1B schedule holds its own micro-batch and one for each later stage. Interleaved, the first
    of P stages with C chunks runs 2 (P - 1) + (C - 1) P chunks ahead of its first backward pass, and each stage
    two fewer than the previous one.
    """
    parallel, microbatches = config.parallel, microbatches_per_step(config, world_size)
    layers, stages = config.model.num_layers // parallel.pipeline, parallel.pipeline
    chunks = parallel.virtual_pipeline
    if chunks == 1:
        return layers * min(microbatches, stages - stage)
    ahead = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
    return layers // chunks * min(microbatches * chunks, ahead)


def activation_bytes(config: TideConfig, world_size: int, stage: int) -> int:
    """Return the peak bytes of activations: of layers in flight, the layer in work, and each chunk's output."""
    parallel, element = config.parallel, element_bytes(config)
    tokens = config.trainer.micro_batch_size * config.data.seq_length
    sequence = parallel.tensor if parallel.sequence_parallel else 1
    flying = layers_in_flight(config, world_size, stage)
    outputs = flying * parallel.pipeline * parallel.virtual_pipeline // config.model.num_layers
    ends = element * config.model.hidden_size // sequence * outputs
    return tokens * (flying * layer_bytes(config) + working_bytes(config) + ends)


def loss_bytes(config: TideConfig) -> int:
    """Return the bytes of the loss on the last stage: 4 V d / t, 2 e n d, and a chunk of at most n V / t logits.

    The hidden states, and their gradient, are whole there on every tensor rank. If the softmax is not compiled,
    a chunk also keeps its exponentials in fp32.
    """
    tokens, element = config.trainer.micro_batch_size * config.data.seq_length, element_bytes(config)
    width, entries = config.model.hidden_size, config.model.vocab_size // config.parallel.tensor
    most = max(1, LOGIT_CHUNK_BYTES // (entries * element))
    chunk = min(tokens, config.kernels.loss_tokens or most) * entries
    logits = chunk * (element if config.kernels.compile else element + 4)
    return 4 * entries * width + 2 * element * tokens * width + logits


def distinct_types(tokens: int, vocab_size: int) -> int:
    """Return an upper estimate of distinct token types in natural text: 8 tokens^(2/3).

    Measured with Llama-3's tokenizer in 2,048 to 131,072 tokens of English documentation: at most 6.7
    tokens^(2/3).
    """
    return min(vocab_size, tokens, round(8 * tokens ** (2 / 3)))


def row_bytes(config: TideConfig, world_size: int, stage: int) -> int:
    """Return the bytes of one reading: U rows of K d, as the layers read them (e), and their gradient (4).

    On the first stage also the rows as fetched (e), and the gradients of both forms (2 e).
    """
    memory, element = config.memory, element_bytes(config)
    if not memory.num_blocks:
        return 0
    served = memory.window or microbatches_per_step(config, world_size)
    tokens = served * config.trainer.micro_batch_size * config.data.seq_length
    values = distinct_types(tokens, config.model.vocab_size) * memory.num_blocks * config.model.hidden_size
    return values * (4 * element + 4 if stage == 0 else element + 4)


def _on_stage(config: TideConfig, world_size: int, stage: int) -> DeviceMemory:
    parallel, element = config.parallel, element_bytes(config)
    replicas = max(1, data_parallel_size(config, world_size))
    parameters = stage_parameters(config, stage)
    weights, buffers = element * parameters.total, 0
    if parallel.zero_stage >= 3:
        buckets = min(REDUCE_BUCKET, parameters.total) + parameters.total // replicas
        buffers = element * (buckets + min(LIVE_PARAMETERS, parameters.total))
        weights //= replicas
    owned = 0
    if stage == 0 and config.memory.owners == "tensor_data":
        rows = math.ceil(config.model.vocab_size / (parallel.tensor * replicas))
        owned = 16 * rows * config.memory.num_blocks * config.model.hidden_size
    return DeviceMemory(
        weights=weights,
        optimizer=12 * parameters.total // replicas,
        owned_rows=owned,
        buffers=buffers,
        gradients=backward_gradients(config, world_size, parameters),
        activations=activation_bytes(config, world_size, stage),
        loss=loss_bytes(config) if stage == parallel.pipeline - 1 else 0,
        rows=row_bytes(config, world_size, stage),
        reduction=reduction_bytes(config, world_size, parameters),
        update=update_bytes(config, world_size, parameters),
    )
