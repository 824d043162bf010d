"""Bytes that the memory adds to a training step, term by term, and the overhead they predict on a GPU."""

from dataclasses import dataclass

from tide_mega.config.schema import MemoryConfig, ModelConfig
from tide_mega.config.sizes import flops_per_token
from tide_mega.lab.bench.text import expected_types

OPTIMIZER = "tables' AdamW"


@dataclass(frozen=True)
class StepShape:
    """The quantities that determine the bytes of a step on one device."""

    model: ModelConfig
    blocks: int
    tokens: int
    """Of a microbatch, N."""
    accumulation: int
    """Microbatches of a step."""
    micro_types: int
    """Distinct types of a microbatch, U."""
    step_types: int
    """Distinct types of the step."""
    element: int
    """Bytes of a weight and of a hidden state's value: 2 in bf16, 4 in fp32."""
    router_in_norm: bool
    """Whether the router shares the passes of the norm before it, as the GPU kernels do."""
    owned: bool
    """Whether each row has one owner, as in the presets: `memory.owners=tensor_data`."""

    @staticmethod
    def expected(
        model: ModelConfig, blocks: int, tokens: int, accumulation: int, element: int = 2
    ) -> "StepShape":
        """Build it with types as measured on text, the GPU kernels, and the presets' owners."""
        micro_types = expected_types(tokens, model.vocab_size)
        step_types = expected_types(tokens * accumulation, model.vocab_size)
        return StepShape(
            model,
            blocks,
            tokens,
            accumulation,
            micro_types,
            step_types,
            element,
            router_in_norm=True,
            owned=True,
        )


def memory_bytes(shape: StepShape) -> dict[str, int]:
    """Return the bytes that the memory adds to a step, by term, beyond what the base model moves.

    N tokens and U types of a microbatch, A microbatches, S types of the step, L layers, D width, V vocabulary,
    J = K + 1, e bytes of a value.

    - row plan: A (8 N read to find the step's types; 8 N read, 8 N written to order tokens by row)
    - gather and norm: rows read, kept, read again and normalised ones written, 4 S K D e
    - router forward, A L times: logits written, N J e; outside the norm its input read, N D e
    - mix forward, A L times: rows read, U K D e; logits read and weights written, N J (e + 4); token rows, 4 N.
      Residual, FFN output and sum are what the base model moves too.
    - mix backward, A L times: output's gradient and rows read, (N D + U K D) e; weights read and the logits'
      gradient written, N J (4 + e); token rows, 4 N
    - router backward, A L times: the input read for the router's own gradient, N D e; the logits' gradient read
      for that and for the input's, 2 N J e; outside the norm the input's gradient read and written with the
      router's added, 2 N D e. The norm's own passes are the base model's.
    - row gradient, A times: each layer's output gradient and weights read, L N (D e + 4 J); the fp32 sum read and
      written, 8 U K D
    - norm backward: fp32 gradient and rows read, gradient of the rows written, S K D (4 + 2 e)
    - tables' gradient: written whole, V K D e, as dense AdamW needs it
    - tables' AdamW: gradient read for the norm and for the update, 2 e; fp32 master weight and two moments read
      and written, 24; in bf16 the weight written, 2: a parameter, all on this device

    With one owner per row only the step's rows are touched outside AdamW itself: received and added to the fp32
    sum, S K D (e + 8); read for the norm, scaled and cleared, 16 S K D. AdamW reads the whole fp32 gradient once
    and there is no copy of the weights: 28 a parameter.
    """
    model, e = shape.model, shape.element
    if shape.blocks == 0:
        return {}
    width, layers = model.hidden_size, model.num_layers
    hidden, banks = shape.tokens * width, shape.tokens * (shape.blocks + 1)
    block_row = shape.blocks * width
    rows, board = shape.micro_types * block_row, shape.step_types * block_row
    table = model.vocab_size * block_row
    apart = 0 if shape.router_in_norm else hidden
    once_a_layer = {
        "router forward": e * (apart + banks),
        "mix forward": e * rows + banks * (e + 4) + 4 * shape.tokens,
        "mix backward": e * (hidden + rows) + banks * (4 + e) + 4 * shape.tokens,
        "router backward": e * (hidden + 2 * apart + 2 * banks),
    }
    if shape.owned:
        tables_gradient, optimizer = (e + 8) * board, 28 * table + 16 * board
    else:
        tables_gradient, optimizer = e * table, (2 * e + 24 + (2 if e == 2 else 0)) * table
    return {
        "row plan": shape.accumulation * 24 * shape.tokens,
        "gather and norm": 4 * e * board,
        **{name: shape.accumulation * layers * count for name, count in once_a_layer.items()},
        "row gradient": shape.accumulation * (layers * (e * hidden + 4 * banks) + 8 * rows),
        "norm backward": (4 + 2 * e) * board,
        "tables' gradient": tables_gradient,
        OPTIMIZER: optimizer,
    }


@dataclass(frozen=True)
class Prediction:
    """One line of a prediction."""

    shape: StepShape
    base_seconds: float
    """The step at K = 0."""
    seconds: dict[str, float]
    """Seconds the memory adds, by term."""

    @property
    def added(self) -> float:
        """Seconds the memory adds to a step."""
        return sum(self.seconds.values())

    @property
    def overhead(self) -> float:
        """`added` over the step at K = 0."""
        return self.added / self.base_seconds

    @property
    def dominating(self) -> str:
        """The largest term."""
        return max(self.seconds, key=lambda term: self.seconds[term])


def predict(
    shape: StepShape,
    *,
    seq_length: int,
    bandwidth: float,
    tflops: float,
    mfu: float,
    share: float,
    replicas: int = 1,
) -> Prediction:
    """Divide the bytes by the bandwidth reached, and the base model's FLOPs by the rate reached.

    Args:
        shape: of the step.
        seq_length: tokens that attend to each other.
        bandwidth: bytes per second of the data sheet.
        tflops: dense peak of the data sheet.
        mfu: reached by the base model, 0 to 1.
        share: of the bandwidth that the memory's operations reach, 0 to 1.
        replicas: data-parallel ranks, over which ZeRO-1 spreads the tables' AdamW.
    """
    tokens = shape.tokens * shape.accumulation
    flops = tokens * flops_per_token(shape.model, MemoryConfig(0), seq_length)
    seconds = {term: count / (share * bandwidth) for term, count in memory_bytes(shape).items()}
    if OPTIMIZER in seconds:
        seconds[OPTIMIZER] /= replicas
    return Prediction(shape, flops / (mfu * tflops * 1e12), seconds)
