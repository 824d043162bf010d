"""Texts scored with the rows that an export hands out in each format.

Shapes: V vocabulary, K memory blocks, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tide_mega.data.batch import TokenBatch
from tide_mega.diagnostics.other_rows import as_stored, rise, score_texts
from tide_mega.hf.rows_tide import RowFormat
from tide_mega.metrics.records import TextResult
from tide_mega.trained.model import TrainedModel

TRAINED = "fp32"
"""The tables as they were trained, with which the others are compared."""
STORED = ("bf16", "int8", "int4", "nf4")
"""Formats of finished rows; a rank is Figure 12's."""


@dataclass(frozen=True)
class Precisions:
    """What one run scores with its tables in every format."""

    label: str
    num_blocks: int
    """K."""
    stored: Mapping[str, int]
    """Bytes of all rows, by format."""
    by_format: Mapping[str, Mapping[str, TextResult]]
    """By format, `TRAINED` first, and text."""

    @property
    def texts(self) -> list[str]:
        """Names, the held-out split first."""
        return list(self.by_format[TRAINED])

    def rise(self, kind: str, text: str) -> float:
        """Return by how much, in per cent, the perplexity is above that of the trained tables."""
        return rise(self.by_format[TRAINED][text].loss, self.by_format[kind][text].loss)


def measure(label: str, model: TrainedModel, texts: Mapping[str, Sequence[TokenBatch]]) -> Precisions:
    """Score the texts with the model's own rows, and with those of each of `STORED`."""
    K, D = model.stage.block_shape
    forms = {kind: RowFormat(kind, K, D) for kind in (TRAINED, *STORED)}
    by_format = {TRAINED: score_texts(model, texts)}
    by_format |= {kind: score_texts(model, texts, as_stored(model, forms[kind])) for kind in STORED}
    stored = {kind: model.stage.vocab_size * form.record_bytes for kind, form in forms.items()}
    return Precisions(label, K, stored, by_format)
