"""Options of `python -m tide_mega.evaluate`."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from omegaconf import MISSING

from tide_mega.errors import refuse

TITLES = {
    "arc_challenge": "ARC-C",
    "arc_easy": "ARC-E",
    "boolq": "BoolQ",
    "hellaswag": "HellaSwag",
    "lambada_openai": "LAMBADA",
    "openbookqa": "OBQA",
    "piqa": "PIQA",
    "sciq": "SciQ",
}
"""The tasks of the paper's Table 2: the harness's names, and what the table calls them."""


@dataclass
class EvaluateOptions:
    """Arguments of an evaluation."""

    run: list[str] = MISSING
    """Run folders, or checkpoints in them (runs/x/checkpoints/step-00000500), each as `path` or `label=path`; the
    baseline first."""
    tasks: list[str] = field(default_factory=lambda: list(TITLES))
    """Names of the harness's tasks: the eight of the paper's Table 2, or others."""
    local: str | None = None
    """Folder with arc_challenge.jsonl, arc_easy.jsonl, boolq.jsonl, lambada_openai.jsonl, openbook_qa.jsonl and
    piqa.jsonl, or some of them: nothing is asked of the hub then. null takes the harness's data from the hub."""
    limit: int | None = None
    """Examples of each task, the first ones; null takes all."""
    metric: str = "acc_norm"
    """In the table acc_norm (accuracy by log-likelihood per character, where a task has it, as in the paper; BoolQ
    and LAMBADA have acc alone) or acc; the JSON has all of them."""
    out: str | None = None
    """Folder of the results; null means `evaluation` in the last run's folder."""
    data: str | None = None
    """Where the prepared dataset, which has the tokenizer, lies now; null means where the runs' configuration
    says."""
    batch: int = 16
    """Most sequences in one forward pass of a replica."""
    tensor: int = 1
    """Tensor-parallel processes of a replica, whatever the topology that saved the checkpoint."""
    pipeline: int = 1
    """Pipeline stages of a replica; what is left of torchrun's processes are replicas."""
    precision: str = "fp32"
    """fp32 or bf16, of weights and computation."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: int | None = None
    """CPU threads of each process; null takes its share of the machine's cores."""
    fresh: bool = False
    """Whether to compute again what `out` already has for the same checkpoint, task and limit."""


def check(options: EvaluateOptions) -> None:
    """Refuse invalid options.

    Raises:
        ConfigError: a value out of range, or an empty or repeated list.
    """
    for name in ("batch", "tensor", "pipeline"):
        if getattr(options, name) < 1:
            refuse(name, getattr(options, name), "is too small", "use 1 or more")
    if options.threads is not None and options.threads < 1:
        refuse("threads", options.threads, "is too small", "use 1 or more, or null")
    if options.limit is not None and options.limit < 1:
        refuse("limit", options.limit, "leaves no example", "use 1 or more, or null for all")
    for name, allowed in (
        ("metric", ("acc_norm", "acc")),
        ("precision", ("fp32", "bf16")),
        ("device", ("auto", "cpu", "cuda")),
    ):
        if (value := getattr(options, name)) not in allowed:
            refuse(name, value, "is not known", f"use {' or '.join(allowed)}")
    for name in ("run", "tasks"):
        values = getattr(options, name)
        if not values or len(set(values)) < len(values):
            refuse(name, ",".join(values), "is empty or names one twice", "name each once")


def refuse_unknown(tasks: Sequence[str], known: Sequence[str], harness: str) -> None:
    """Refuse a task that the harness, by its name and version, does not know.

    Raises:
        ConfigError: names the first such task and similar ones.
    """
    unknown = next((task for task in tasks if task not in known), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, known, 1)
        meant = f"the nearest name is {near[0]}, and " if near else ""
        refuse("tasks", unknown, f"is no task of {harness}", f"{meant}`lm_eval ls tasks` lists them")
