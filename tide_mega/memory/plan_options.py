"""What the planning tool can be asked."""

from dataclasses import dataclass, field
from pathlib import Path

from tide_mega.config.errors import refuse
from tide_mega.data.lines import MAX_DOCUMENT_BYTES
from tide_mega.memory.distinct import ORDERS

_AT_LEAST_ONE = (
    *("max_document_bytes", "max_tokens", "seq_length", "most_steps", "width", "tensor", "data", "pipeline"),
    *("micro_batch", "in_flight"),
)


@dataclass
class PlanOptions:
    """Options of `tools/memory_plan.py`."""

    text: list[str] = field(default_factory=lambda: ["stdlib"])
    """Files or folders that tools/prepare_data.py reads; `stdlib`; or one folder that it wrote, whose training
    split is read as it was tokenised."""
    tokenizer: str | None = None
    """A tokenizer.json or a Llama-3 tokenizer.model; null takes the one in the installed package
    llama_models."""
    suffixes: list[str] = field(default_factory=list)
    """Further file suffixes read as plain text, e.g. [.py,.rst]."""
    text_key: str = "text"
    """Key of a JSON line, or column of a parquet file, that holds the text."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """Most bytes of one document, decompressed; a longer one is refused."""
    max_tokens: int = 4_000_000
    """Text is tokenised up to there."""
    tokens: list[int] = field(default_factory=lambda: [2048, 8192, 32768, 65536])
    """Tokens a data-parallel rank reads in an optimizer step, all its microbatches together."""
    seq_length: int = 2048
    order: str = "shuffled"
    """How sequences make a step: shuffled, as the training loader deals them, or contiguous."""
    most_steps: int = 32
    """Most steps measured for each number of tokens; they share no text."""
    blocks: list[int] = field(default_factory=lambda: [8, 24])
    """Values of K."""
    width: int = 2048
    vocab: int | None = None
    """Rows of a table; null means the tokenizer's vocabulary."""
    tensor: int = 1
    data: int = 32
    """Data-parallel ranks; at 32, ranks of 32,768 tokens make the 1B runs' steps of 1,048,576."""
    pipeline: int = 1
    sequence_parallel: bool = False
    gigabits: float = 400.0
    """Rate of a rank's link in 10^9 bit/s, each way; what leaves a replica is timed at it."""
    micro_batch: int = 8
    """Sequences of a microbatch, for the memory of the plain approach."""
    in_flight: int = 1
    """Microbatches whose M the plain approach holds at a time: up to `pipeline` under 1F1B."""
    memory_tokens: int = 32768
    """Tokens of the step whose rows the table of memory counts; one of `tokens`."""
    out: str | None = None
    """JSON file to write with all the figures, bytes by kind too."""


def validate_plan_options(options: PlanOptions) -> None:
    """Checks each option by itself, and those that go together.

    Raises:
        ConfigError: naming the option, its value and what would do.
    """
    for name in _AT_LEAST_ONE:
        if getattr(options, name) < 1:
            refuse(name, getattr(options, name), "is too small", "give at least 1")
    if options.gigabits <= 0:
        refuse("gigabits", options.gigabits, "is no rate", "give a positive number, e.g. 400")
    if options.order not in ORDERS:
        refuse("order", options.order, "is unknown", f"use {' or '.join(ORDERS)}")
    for name in ("tokens", "blocks"):
        if min(getattr(options, name), default=0) < 1:
            refuse(name, getattr(options, name), "leaves nothing to plan", "list numbers of at least 1")
    for tokens in options.tokens:
        if tokens % options.seq_length:
            multiple = f"give multiples of seq_length={options.seq_length}"
            refuse("tokens", tokens, "is no whole number of sequences", multiple)
    if options.memory_tokens not in options.tokens:
        one_of = ", ".join(map(str, options.tokens))
        refuse("memory_tokens", options.memory_tokens, "is not among tokens", f"use one of {one_of}")
    if options.out is not None and not Path(options.out).absolute().parent.is_dir():
        refuse("out", options.out, "lies in a folder that does not exist", "make the folder first")
