"""Data that needs no download: token ids distributed as in text, and this package's sources as a dataset.

Also the number of distinct types to expect among such ids.

Shapes: V vocabulary, N tokens.
"""

import itertools
import math
from pathlib import Path

import torch
from torch import Tensor

import tide_mega
from tide_mega.data.prepare.options import PrepareOptions
from tide_mega.data.prepare.pipeline import prepare

DISTRIBUTIONS = ("zipf", "uniform", "one")
ZIPF_SHIFT, ZIPF_POWER = 0.5, 1.15
"""p(v) ~ (v + shift) ** -power: at V = 128,256 it gives the measured numbers of types below to 4 %."""
MEASURED_TYPES = {2_048: 620, 8_192: 1_909, 32_768: 5_448, 65_536: 8_810}
"""Tokens -> distinct types of English documentation with the Llama-3 tokenizer (tools/memory_plan.py)."""


def draw_ids(distribution: str, count: int, vocab: int, seed: int) -> Tensor:
    """Draw ids [count], int64 on the CPU: by Zipf's law, uniformly, or a single id.

    Raises:
        ValueError: the distribution is not one of `DISTRIBUTIONS`.
    """
    generator = torch.Generator().manual_seed(seed)
    if distribution == "zipf":
        cumulative_V = ((torch.arange(vocab, dtype=torch.float64) + ZIPF_SHIFT) ** -ZIPF_POWER).cumsum(0)
        drawn_N = torch.rand(count, dtype=torch.float64, generator=generator) * cumulative_V[-1]
        return torch.searchsorted(cumulative_V, drawn_N).clamp_(max=vocab - 1)
    if distribution == "uniform":
        return torch.randint(vocab, (count,), generator=generator)
    if distribution == "one":
        return torch.full((count,), vocab // 2)
    raise ValueError(f"distribution is {distribution!r}: must be one of {', '.join(DISTRIBUTIONS)}")


def expected_types(tokens: int, vocab: int) -> int:
    """Return the distinct types among `tokens`, inter- and extrapolated log-log from `MEASURED_TYPES`."""
    known = sorted(MEASURED_TYPES.items())
    pairs = list(itertools.pairwise(known))
    (n0, u0), (n1, u1) = next((pair for pair in pairs if tokens <= pair[1][0]), pairs[-1])
    slope = math.log(u1 / u0) / math.log(n1 / n0)
    return max(1, min(round(u0 * (tokens / n0) ** slope), tokens, vocab))


def prepare_own_text(folder: Path, vocab_size: int) -> Path:
    """Tokenise the package's sources with a BPE of `vocab_size`; return the prepared folder."""
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(sorted(Path(tide_mega.__file__).parent.rglob("*.py"))):
        (text / f"{number:03d}.txt").write_text(path.read_text(encoding="utf-8") or "empty\n")
    options = PrepareOptions(
        inputs=[str(text)],
        out=str(folder / "data"),
        tokenizer=f"bpe:{vocab_size}",
        validation_fraction=0.2,
        workers=1,
    )
    prepare(options, log=lambda _: None, progress=False)
    return folder / "data"
