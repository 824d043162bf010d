"""Options of the preparation tool, and their checks."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from tide_mega.data.prepare.compressed import MAX_DOCUMENT_BYTES
from tide_mega.errors import ConfigError

BPE_PREFIX = "bpe:"
SMALLEST_BPE = 512
"""256 bytes, the EOS token, and room for merges."""


@dataclass
class PrepareOptions:
    """Options of `tools/prepare_data.py`."""

    inputs: list[str] = MISSING
    """Files or folders of .txt, .jsonl, .ndjson and .json (an object a line), each also .gz, .zst, .xz or .bz2,
    and .parquet; `stdlib` is Python's own library source."""
    out: str = MISSING
    """Folder to write; an interrupted preparation in it is continued."""
    tokenizer: str = MISSING
    """A tokenizer.json, a Llama-3 tokenizer.model, or bpe:16384 to train a byte-level BPE of that size."""
    eos_token: str | None = None
    """The tokenizer's end-of-document token; null looks for a common name."""
    text_key: str = "text"
    """Key of a JSON line, or column of a parquet file, that holds the text."""
    suffixes: list[str] = field(default_factory=list)
    """Further file suffixes read as plain text, e.g. [.py,.rst]; compressed ones (.py.gz) too."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """Most bytes of one document (a .txt file, a line of JSON, a value of parquet), decompressed; a longer one is
    bad. Also the most memory that a .zst or .xz may ask for as its window, of which 128 MiB are always allowed."""
    validation_fraction: float = 0.01
    """Share of the documents held out, chosen by a hash of their text."""
    seed: int = 1234
    """Seed of the choice of held-out documents."""
    sample_tokens: int = 1_048_576
    """Tokens in one sample of a shard."""
    shard_tokens: int = 67_108_864
    """Most tokens in one shard (tar file)."""
    unit_bytes: int = 0
    """Input bytes of one unit of work; 0 takes 1/64 of the input, within 4 MiB to 512 MiB."""
    bpe_train_bytes: int = 67_108_864
    """Most input bytes a BPE is trained on."""
    workers: int = 0
    """Processes; 0 means one for each CPU. The output does not depend on it."""
    on_bad_file: str = "fail"
    """What a file or record that cannot be read does: fail, or skip (counted and named in index.json)."""
    overwrite: bool = False
    """Start afresh where an earlier preparation wrote: what it left in `out` is replaced once the new dataset is
    whole (both need room until then), and stays if that fails. Files of another origin are never removed."""


def validate_options(options: PrepareOptions) -> None:
    """Check each option by itself.

    Raises:
        ConfigError: naming the option, its value and a valid one.
    """
    if not options.inputs:
        raise ConfigError("inputs is empty; name at least one file or folder, or stdlib")
    if options.on_bad_file not in ("fail", "skip"):
        raise ConfigError(f"on_bad_file={options.on_bad_file} is unknown; use fail or skip")
    if not 0 <= options.validation_fraction < 1:
        raise ConfigError(
            f"validation_fraction={options.validation_fraction} is not in [0, 1); 0.01 holds out 1 %"
        )
    for name in ("sample_tokens", "shard_tokens", "bpe_train_bytes", "max_document_bytes"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}={getattr(options, name)} must be at least 1")
    if options.sample_tokens >= 2**32:
        raise ConfigError(
            f"sample_tokens={options.sample_tokens} must be below 2^32, so that ends fit uint32"
        )
    if options.shard_tokens < options.sample_tokens:
        raise ConfigError(
            f"shard_tokens={options.shard_tokens} is below sample_tokens={options.sample_tokens}; "
            "a shard holds at least one sample"
        )
    for name in ("unit_bytes", "workers"):
        if getattr(options, name) < 0:
            raise ConfigError(f"{name}={getattr(options, name)} must be 0 (automatic) or positive")
    for suffix in options.suffixes:
        if not suffix.startswith("."):
            raise ConfigError(
                f"suffixes has {suffix!r}, which does not begin with a dot; use {'.' + suffix!r}"
            )
    bpe_size(options)


def bpe_size(options: PrepareOptions) -> int | None:
    """Return the vocabulary size of the BPE to train, or None if the tokenizer is a file.

    Raises:
        ConfigError: the size is not a number or too small.
    """
    if not options.tokenizer.startswith(BPE_PREFIX):
        return None
    size = options.tokenizer.removeprefix(BPE_PREFIX)
    if not size.isascii() or not size.isdigit() or int(size) < SMALLEST_BPE:
        raise ConfigError(
            f"tokenizer={options.tokenizer} is not {BPE_PREFIX} and a size of at least {SMALLEST_BPE}; "
            f"use for example {BPE_PREFIX}16384"
        )
    return int(size)


def identity(options: PrepareOptions, tokenizer_sha256: str | None) -> dict[str, Any]:
    """Return the options on which the output depends, for comparison with an earlier preparation."""
    tokenizer = options.tokenizer if tokenizer_sha256 is None else f"sha256:{tokenizer_sha256}"
    return {
        "tokenizer": tokenizer,
        "bpe_train_bytes": options.bpe_train_bytes if tokenizer_sha256 is None else None,
        "eos_token": options.eos_token,
        "text_key": options.text_key,
        "suffixes": sorted(options.suffixes),
        "max_document_bytes": options.max_document_bytes,
        "validation_fraction": options.validation_fraction,
        "seed": options.seed,
        "sample_tokens": options.sample_tokens,
        "shard_tokens": options.shard_tokens,
        "unit_bytes": options.unit_bytes,
    }
