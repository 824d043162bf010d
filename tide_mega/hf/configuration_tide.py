"""The configuration of a TIDE model (arXiv 2605.06216) for transformers: Llama's, plus the memory's storage."""

from typing import Any

from transformers import LlamaConfig


class TideConfig(LlamaConfig):
    """Llama's configuration with K memory blocks.

    Args:
        num_memory_blocks: K, the number of tables indexed by token id that every layer reads.
        memory_format: fp32 or bf16 for tables as trained, with the gains of their norms (in a file: normalised
            rows with the gain folded in); int8, int4, nf4 or rank for such rows, which cannot be trained.
        memory_rank: with memory_format=rank, columns of the joint low-rank factors.
        memory_part_rows: rows of each tensor that the tables are split into.
        memory_file: the file of rows beside the weights; None means they are among the weights.
        memory_fingerprint: fingerprint of that file's contents.
        vocabulary_fingerprint: of the tokenizer's vocabulary; detects another tokenizer beside the weights.
        memory_store: device, host or disk: where the rows of `memory_file` are kept while the model runs.
        memory_cache: with memory_store=disk, the share of the rows kept in memory once read.
        kwargs: see LlamaConfig.
    """

    model_type = "tide"

    def __init__(
        self,
        num_memory_blocks: int = 0,
        memory_format: str = "bf16",
        memory_rank: int | None = None,
        memory_part_rows: int = 65_536,
        memory_file: str | None = None,
        memory_fingerprint: str | None = None,
        vocabulary_fingerprint: str | None = None,
        memory_store: str = "disk",
        memory_cache: float = 0.05,
        **kwargs: Any,
    ) -> None:
        self.num_memory_blocks = num_memory_blocks
        self.memory_format = memory_format
        self.memory_rank = memory_rank
        self.memory_part_rows = memory_part_rows
        self.memory_file = memory_file
        self.memory_fingerprint = memory_fingerprint
        self.vocabulary_fingerprint = vocabulary_fingerprint
        self.memory_store = memory_store
        self.memory_cache = memory_cache
        super().__init__(**kwargs)
