"""What `python -m tide_mega.analyze` can be told."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from tide_mega.data.lines import MAX_DOCUMENT_BYTES


@dataclass
class AnalyzeOptions:
    """Arguments of an analysis."""

    run: list[str] = MISSING
    """Run folders, or checkpoints in them (runs/x/checkpoints/step-00000500), each as `path` or `label=path`. The
    baseline and TIDE together give the comparisons."""
    which: list[str] = field(default_factory=lambda: ["all"])
    """Diagnostics to make; all of them, or names that --help lists."""
    out: str | None = None
    """Folder for data, figures and report.html; null means `analysis` in the folder of the run given last."""
    data: str | None = None
    """Where the prepared dataset lies now; null means where the runs' configuration says."""
    texts: list[str] = field(default_factory=list)
    """Text files on which perplexity is measured, besides the held-out split."""
    sequences: int = 64
    """Held-out sequences that models are run on."""
    text_tokens: int = 65_536
    """Most tokens read of each text file; 0 reads all."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """Most bytes of one document of them (a plain text is one, and so is a JSON line), decompressed."""
    batch: int = 8
    """Sequences in one forward pass."""
    templates: int = 150
    """Template sentences for the distances of token pairs; 150 are there."""
    decode_tokens: int = 256
    """Tokens that each run decodes for the time of one; the paper averages over 5,120."""
    precision: str = "fp32"
    """fp32 or bf16, of models while they are run."""
    device: str = "auto"
    """auto, cpu or cuda."""
    seed: int = 0
    """Of everything that is sampled."""
    fresh: bool = False
    """Whether to make again what an earlier analysis of the same checkpoints has left in `out`."""
