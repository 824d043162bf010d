"""An exported folder: its tensors and files, checked by name, shape and dtype before any is loaded.

Shapes: V vocabulary, D hidden size, H and G heads of queries and of keys and values, C head size, K memory blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tide_mega.data.tokenizer import Tokenizer, load_tokenizer
from tide_mega.errors import ConfigError, FolderError
from tide_mega.files import read_json, regular_file
from tide_mega.hf.memory_tide import MemoryStore, SidecarError, TableStore, TensorStore, open_store
from tide_mega.hf.sidecar_tide import COPY_AGAIN
from tide_mega.hf.tokens_tide import TokenizerError, check_vocabulary
from tide_mega.inference.model_config import ModelConfig, read_config

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class _Expected:
    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = tuple(_FLOATS)


@dataclass(frozen=True)
class ModelFolder:
    """A folder whose files are complete and match the configuration; tensors are read on demand."""

    path: Path
    config: ModelConfig
    files: dict[str, str]
    """File name by tensor."""

    @classmethod
    def open(cls, path: Path | str) -> "ModelFolder":
        """Check everything except the values of tensors and the records of a sidecar.

        Raises:
            ConfigError: the folder does not exist.
            FolderError: a file is missing, truncated or another model's, or the model is not supported.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ConfigError(f"model={path} is not a folder: give one that tide_mega.export wrote.")
        config = read_config(folder)
        files = _check_tensors(folder, expected_tensors(config))
        return cls(folder, config, files)

    def tensor(self, name: str) -> Tensor:
        """Read a tensor in its stored dtype.

        Raises:
            FolderError: its file has changed, or can no longer be read.
        """
        return next(self.tensors([name]))[1]

    def tensors(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors in the order of `names`; each file is opened once if its tensors are adjacent."""
        expected = expected_tensors(self.config)
        file, opened = "", None
        for name in names:
            if self.files[name] != file or opened is None:
                file = self.files[name]
                opened = _open(self.path, file)
            try:
                found = opened.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise FolderError(f"{self.path / file} cannot be read: {error}; {COPY_AGAIN}.") from error
            if tuple(found.shape) != expected[name].shape:
                raise FolderError(f"{self.path / file} changed while it was read: start again.")
            # A copy: safetensors may return a view of the file, which may be overwritten later.
            yield name, found.clone()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer, checked against the model.

        Raises:
            FolderError: there is none, or it is another model's.
        """
        eos: str | None = None
        try:
            found = read_json(self.path, "tokenizer_config.json")
            eos = found.get("eos_token") if isinstance(found, dict) else None
            eos = eos.get("content") if isinstance(eos, dict) else eos
        except FileNotFoundError:
            pass
        except ValueError as error:
            raise FolderError(f"{self.path / 'tokenizer_config.json'} cannot be read: {error}.") from error
        try:
            check_vocabulary(self.path, self.config.vocabulary_fingerprint)
        except TokenizerError as error:
            raise FolderError(str(error)) from error
        try:
            tokenizer = load_tokenizer(self.path, eos if isinstance(eos, str) else None)
        except ConfigError as error:
            raise FolderError(f"{self.path} has no tokenizer of this model: {error}") from error
        size = self.config.shape.vocab_size
        if tokenizer.vocab_size > size:
            raise FolderError(
                f"the tokenizer in {self.path} has ids up to {tokenizer.vocab_size - 1}, the model a vocabulary "
                f"of {size}: it is another model's; {COPY_AGAIN}."
            )
        if self.config.eos_ids and tokenizer.eos_id not in self.config.eos_ids:
            raise FolderError(
                f"the tokenizer in {self.path} ends texts with id {tokenizer.eos_id}, the model with "
                f"{', '.join(map(str, self.config.eos_ids))}: it is another model's; {COPY_AGAIN}."
            )
        return tokenizer

    def open_memory(
        self, place: str, cache: float, device: torch.device, threads: int = 16
    ) -> MemoryStore | None:
        """Open the store that returns M(v); None if K = 0.

        Args:
            place: device, host or disk: where rows are kept.
            cache: with disk, the share of the rows kept in memory once read.
            device: where the model computes.
            threads: with disk, concurrent reads.

        Raises:
            ConfigError: disk, although the rows are among the weights.
            FolderError: the rows cannot be used.
        """
        memory = self.config.memory
        if memory is None:
            return None
        if memory.file is None:
            return self._memory_of_weights(place, device)
        try:
            return open_store(
                regular_file(self.path, memory.file),
                memory.format,
                rows=self.config.shape.vocab_size,
                fingerprint=memory.fingerprint,
                place=place,
                cache=cache,
                device=device,
                threads=threads,
            )
        except FileNotFoundError:
            raise FolderError(
                f"{self.path} has no {memory.file}, the file with this model's memory: {COPY_AGAIN}."
            ) from None
        except SidecarError as error:
            raise FolderError(f"{error}.") from error
        except ValueError as error:  # not a plain file name, or not a regular file
            raise FolderError(f"the memory of {self.path} cannot be used: {error}.") from error

    def _memory_of_weights(self, place: str, device: torch.device) -> MemoryStore:
        if place == "disk":
            raise ConfigError(
                f"memory=disk needs the memory in a file of its own, and {self.path} has it among the weights: "
                "export with memory=sidecar, or use memory=host or memory=device."
            )
        memory = self.config.memory
        assert memory is not None
        at = device if place == "device" else torch.device("cpu")
        kind = "tables." if memory.is_trained else "records_"
        names = [
            f"model.memory.{kind}{part}" for part in range(len(memory.parts(self.config.shape.vocab_size)))
        ]
        parts = [tensor.to(at) for _, tensor in self.tensors(names)]
        store: MemoryStore
        if memory.is_trained:
            gains = self.tensor("model.memory.gains").to(at)
            store = TableStore(parts, gains, self.config.shape.norm_eps)
        else:
            basis = self.tensor("model.memory.basis").to(at) if memory.format.basis_shape else None
            store = TensorStore(parts, memory.format, basis)
        return store if at == device else _OnHost(store)


class _OnHost(MemoryStore):
    """A store in host memory for a model on another device: rows are decoded on the host and copied."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__()
        self._inner = inner

    def rows(self, ids_N: Tensor, dtype: torch.dtype) -> Tensor:
        """See MemoryStore."""
        return self._inner.rows(ids_N.cpu(), dtype).to(ids_N.device)


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the weights of one layer, without `model.layers.<number>.`."""
    shape = config.shape
    D, F = shape.hidden_size, shape.ffn_hidden_size
    queries, keys = shape.num_heads * shape.head_size, shape.num_groups * shape.head_size
    found: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (queries, D),
        "self_attn.k_proj.weight": (keys, D),
        "self_attn.v_proj.weight": (keys, D),
        "self_attn.o_proj.weight": (D, queries),
        "post_attention_layernorm.weight": (D,),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
    }
    if shape.num_blocks:
        found["router.weight"] = (shape.num_blocks + 1, D)
    return found


def expected_tensors(config: ModelConfig) -> dict[str, _Expected]:
    """Return every tensor that the weights of such a model contain."""
    shape, memory = config.shape, config.memory
    V, D, K = shape.vocab_size, shape.hidden_size, shape.num_blocks
    found = {"model.embed_tokens.weight": _Expected((V, D)), "model.norm.weight": _Expected((D,))}
    if not shape.tie_embeddings:
        found["lm_head.weight"] = _Expected((V, D))
    for layer in range(shape.num_layers):
        for name, size in layer_shapes(config).items():
            found[f"model.layers.{layer}.{name}"] = _Expected(size)
    if memory is None or memory.file is not None:
        return found
    for number, rows in enumerate(memory.parts(V)):
        if memory.is_trained:
            found[f"model.memory.tables.{number}"] = _Expected((rows, K, D))
        else:
            size = (rows, memory.format.record_bytes)
            found[f"model.memory.records_{number}"] = _Expected(size, ("U8",))
    if memory.is_trained:
        found["model.memory.gains"] = _Expected((K, D))
    elif memory.format.basis_shape is not None:
        found["model.memory.basis"] = _Expected(memory.format.basis_shape)
    return found


def _open(folder: Path, file: str) -> Any:
    try:
        return safe_open(regular_file(folder, file), framework="pt")
    except FileNotFoundError:
        raise FolderError(f"{folder} has no {file}: {COPY_AGAIN}.") from None
    except (SafetensorError, ValueError, OSError) as error:
        raise FolderError(f"{folder / file} is damaged or cut short ({error}): {COPY_AGAIN}.") from error


def _check_tensors(folder: Path, expected: dict[str, _Expected]) -> dict[str, str]:
    """Return the file of every tensor, after checking that each exists with the expected shape and dtype."""
    stored_in = _stored_in(folder)
    names = stored_in.keys() if stored_in else None
    files: dict[str, str] = {}
    for file in sorted(set(stored_in.values())) if stored_in else [SINGLE_FILE]:
        opened = _open(folder, file)
        for name in opened.keys():  # noqa: SIM118 a handle of safetensors is no mapping
            if name.endswith("rotary_emb.inv_freq"):  # in old checkpoints; computed from the configuration
                continue
            if names is not None and stored_in.get(name) != file:
                raise FolderError(
                    f"{folder / file} holds {name}, which {INDEX_FILE} has elsewhere: {COPY_AGAIN}."
                )
            if name not in expected:
                raise FolderError(f"{folder / file} holds {name}, for which config.json has no place.")
            part = opened.get_slice(name)
            found, wanted = (tuple(part.get_shape()), part.get_dtype()), expected[name]
            if found[0] != wanted.shape or found[1] not in wanted.dtypes:
                raise FolderError(
                    f"{name} in {folder / file} is {found[1]} {list(found[0])}, and by config.json it should be "
                    f"{' or '.join(wanted.dtypes)} {list(wanted.shape)}: {COPY_AGAIN}."
                )
            files[name] = file
    if missing := sorted(expected.keys() - files.keys()):
        more = f" and {len(missing) - 1} other tensors" if len(missing) > 1 else ""
        raise FolderError(f"{folder} lacks {missing[0]}{more}: {COPY_AGAIN}.")
    return files


def _stored_in(folder: Path) -> dict[str, str]:
    """Return the file of every tensor by the index; empty for a single file without an index."""
    if not (folder / INDEX_FILE).exists():
        if not (folder / SINGLE_FILE).exists():
            raise FolderError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: {COPY_AGAIN}.")
        return {}
    try:
        found = read_json(folder, INDEX_FILE)
    except ValueError as error:
        raise FolderError(f"{folder / INDEX_FILE} cannot be read: {error}.") from error
    by_name = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(by_name, dict) or not by_name or not all(isinstance(f, str) for f in by_name.values()):
        raise FolderError(f"{folder / INDEX_FILE} has no weight_map from tensors to files: {COPY_AGAIN}.")
    return by_name
