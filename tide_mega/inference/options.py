"""Options of `python -m tide_mega.generate`."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from tide_mega.errors import refuse


@dataclass
class GenerateOptions:
    """Arguments of a generation."""

    model: str = MISSING
    """Folder that tide_mega.export wrote, or a stock Llama one."""
    prompt: str | None = None
    """Text to continue; an empty one begins a document."""
    prompts: str | None = None
    """File of prompts in place of `prompt`, or - for standard input, which is read where neither is given: one a
    line, as text or as a JSON object (see above)."""
    max_tokens: int = 128
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 takes the likeliest token; larger values sample."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Sample from the fewest likeliest tokens whose total probability reaches this."""
    seed: int | None = None
    """Of the draws, the same for every prompt, whatever else is in its batch; null draws one for each."""
    stop: list[str] = field(default_factory=list)
    """Strings before which an answer ends."""
    memory: str = "device"
    """Where rows of the memory stay: device, host (pinned, where there is CUDA), or disk, for a model that was
    exported with memory=sidecar."""
    cache: float = 0.05
    """With memory=disk, the share of the rows kept in memory once read."""
    batch: int = 1
    """Prompts answered side by side."""
    max_length: int | None = None
    """Most tokens of a prompt and its answer; null means what the model was trained on, at most 4,096."""
    json: bool | None = None
    """JSON lines in place of text; null means for `prompts` alone."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """fp32 or bf16, of weights and computation; auto is bf16 where the processor multiplies in it."""
    weights: str = "dtype"
    """dtype, or int8: matrices in 8 bits, on a CPU."""
    compile: bool = False
    """Whether to compile the decoding step with torch.compile; takes a minute at the start."""
    threads: int | None = None
    """CPU threads; null takes the machine's cores."""


def check(options: GenerateOptions) -> None:
    """Refuse invalid options.

    Raises:
        ConfigError: a value out of range, or two that exclude each other.
    """
    for name in ("max_tokens", "batch", "max_length", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            refuse(name, value, "is too small", "use 1 or more")
    if not 0 < options.cache <= 1:
        refuse("cache", options.cache, "is no part of the rows", "use more than 0, at most 1")
    for name, allowed in (
        ("memory", ("device", "host", "disk")),
        ("device", ("auto", "cpu", "cuda")),
        ("dtype", ("auto", "fp32", "bf16")),
        ("weights", ("dtype", "int8")),
    ):
        if (value := getattr(options, name)) not in allowed:
            refuse(name, value, "is not known", f"use {', '.join(allowed[:-1])} or {allowed[-1]}")
    if options.prompt is not None and options.prompts is not None:
        refuse("prompts", options.prompts, "stands beside prompt", "give one of them")
