"""Reads config.json of an exported or stock Llama folder: what decoding needs of it, or a refusal."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tide_mega.errors import FolderError
from tide_mega.files import read_json
from tide_mega.hf.rows_tide import TRAINED_KINDS, RowFormat, part_bounds

CONFIG_FILE = "config.json"
MODEL_TYPES = ("tide", "llama")
_LARGEST = 2**31


@dataclass(frozen=True)
class ModelShape:
    """The sizes that determine the architecture; K = 0 is Llama."""

    num_layers: int
    hidden_size: int
    """D."""
    ffn_hidden_size: int
    num_heads: int
    """H, of queries."""
    num_groups: int
    """G, heads of keys and values."""
    head_size: int
    """C."""
    vocab_size: int
    """V."""
    num_blocks: int = 0
    """K."""
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    max_positions: int = 2048
    """Most tokens of a text."""


@dataclass(frozen=True)
class StoredMemory:
    """How the folder stores the memory."""

    format: RowFormat
    part_rows: int
    """Rows of each tensor among the weights."""
    file: str | None
    """File of the rows beside the weights; None if the rows are among the weights."""
    fingerprint: str | None

    @property
    def is_trained(self) -> bool:
        """Whether the weights contain the tables as trained, with their norm's gains."""
        return self.file is None and self.format.kind in TRAINED_KINDS

    def parts(self, rows: int) -> list[int]:
        """Return how many rows each tensor among the weights has."""
        return [last - first for first, last in part_bounds(rows, self.part_rows)]


@dataclass(frozen=True)
class ModelConfig:
    """The contents of config.json."""

    shape: ModelShape
    memory: StoredMemory | None
    bos_id: int | None
    """Token that begins a text without a prompt."""
    eos_ids: tuple[int, ...]
    """Tokens each of which ends a text."""
    vocabulary_fingerprint: str | None


def read_config(folder: Path) -> ModelConfig:
    """Read config.json of a folder, and eos_token_id of generation_config.json if there is one.

    Raises:
        FolderError: a file is missing or damaged, or describes an unsupported model.
    """
    values = _Values(folder, _read(folder, CONFIG_FILE))
    model_type = values.of("model_type", str, "")
    if model_type not in MODEL_TYPES:
        values.refuse(f"model_type is {model_type!r}, and {' and '.join(MODEL_TYPES)} can be run")
    shape = _shape(values, model_type)
    eos: Any = values.get("eos_token_id")
    if (folder / "generation_config.json").exists():
        eos = _read(folder, "generation_config.json").get("eos_token_id", eos)
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    bos = values.get("bos_token_id")
    for name, ids in (("eos_token_id", eos_ids), ("bos_token_id", () if bos is None else (bos,))):
        if not all(type(i) is int and 0 <= i < shape.vocab_size for i in ids):
            values.refuse(
                f"{name} is {ids[0] if len(ids) == 1 else list(ids)}, no id below {shape.vocab_size}"
            )
    vocabulary = values.of("vocabulary_fingerprint", str, None)
    return ModelConfig(shape, _memory(values, shape), bos, eos_ids, vocabulary)


class _Values:
    """The keys of config.json, checked as they are read."""

    def __init__(self, folder: Path, found: Mapping[str, Any]) -> None:
        self._folder = folder
        self._found = found

    def get(self, key: str) -> Any:
        return self._found.get(key)

    def of(self, key: str, kind: type, default: Any) -> Any:
        value = self._found.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            self.refuse(f"{key} is {_shown(value)}, no {kind.__name__}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        value = self._found.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < _LARGEST:
            self.refuse(f"{key} is {_shown(value)}, no number from 1")
        return value

    def positive(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self.refuse(f"{key} is {_shown(value)}, no number above 0")
        return float(value)

    def refuse(self, what: str) -> NoReturn:
        raise FolderError(f"{self._folder / CONFIG_FILE}: {what}.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read(folder: Path, name: str) -> Mapping[str, Any]:
    try:
        found = read_json(folder, name)
    except FileNotFoundError:
        raise FolderError(
            f"{folder} has no {name}: give a folder that tide_mega.export wrote, or a Llama checkpoint."
        ) from None
    except ValueError as error:
        raise FolderError(f"{folder / name} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise FolderError(f"{folder / name} cannot be read: it is no JSON object.")
    return found


def _shape(values: _Values, model_type: str) -> ModelShape:
    for key in ("attention_bias", "mlp_bias"):
        if values.of(key, bool, False):
            values.refuse(f"{key} is true, and layers with biases are not supported")
    if (activation := values.of("hidden_act", str, "silu")) != "silu":
        values.refuse(f"hidden_act is {activation!r}, and silu alone is supported")
    if values.get("quantization_config") is not None:
        values.refuse("it has a quantization_config: give weights in fp32, fp16 or bf16")
    hidden, heads = values.size("hidden_size"), values.size("num_attention_heads")
    groups = values.size("num_key_value_heads", heads)
    if heads % groups:
        values.refuse(f"num_attention_heads is {heads}, no multiple of num_key_value_heads, {groups}")
    if values.get("head_dim") is None and hidden % heads:
        values.refuse(f"hidden_size is {hidden}, no multiple of num_attention_heads, {heads}")
    head_size = values.size("head_dim", max(1, hidden // heads))
    if head_size % 2:
        values.refuse(
            f"head_dim is {head_size}, and rotary positions turn pairs of elements: it must be even"
        )
    blocks = 0
    if model_type == "tide":
        blocks = values.of("num_memory_blocks", int, 0)
        if not 0 <= blocks < 2**16:
            values.refuse(f"num_memory_blocks is {blocks}, no number of tables")
    return ModelShape(
        num_layers=values.size("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=values.size("intermediate_size"),
        num_heads=heads,
        num_groups=groups,
        head_size=head_size,
        vocab_size=values.size("vocab_size"),
        num_blocks=blocks,
        rope_theta=_rope_theta(values),
        norm_eps=values.positive("rms_norm_eps", values.get("rms_norm_eps") or 1e-6),
        tie_embeddings=values.of("tie_word_embeddings", bool, False),
        max_positions=values.size("max_position_embeddings", 2048),
    )


def _rope_theta(values: _Values) -> float:
    """Return θ; transformers 5 writes `rope_parameters`, earlier versions `rope_theta` and `rope_scaling`."""
    theta = values.get("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        given = values.of(key, dict, None)
        if given is None:
            continue
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default" or given.get("partial_rotary_factor", 1.0) != 1.0:
            values.refuse(f"{key} is {_shown(given)}, and rope_type default alone is supported")
        theta = given.get("rope_theta", theta)
    return values.positive("rope_theta", 10_000.0 if theta is None else theta)


def _memory(values: _Values, shape: ModelShape) -> StoredMemory | None:
    if not shape.num_blocks:
        return None
    kind, rank = values.of("memory_format", str, "bf16"), values.of("memory_rank", int, None)
    try:
        row_format = RowFormat(kind, shape.num_blocks, shape.hidden_size, rank)
    except ValueError as error:
        raise FolderError(f"{values._folder / CONFIG_FILE}: {error}.") from error
    return StoredMemory(
        row_format,
        values.size("memory_part_rows", 65_536),
        values.of("memory_file", str, None),
        values.of("memory_fingerprint", str, None),
    )
