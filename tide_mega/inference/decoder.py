"""The decoder: an exported folder's weights, a cache of fixed size, and logits for prompts and single tokens.

Shapes: B sequences, T tokens of each in one pass, N = B T, S places of the cache, G heads of keys and values, C
head size, D hidden size, V vocabulary, K memory blocks.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tide_mega.errors import GenerationError
from tide_mega.hf.memory_tide import MemoryStore, SidecarError
from tide_mega.inference.folder import ModelFolder, layer_shapes
from tide_mega.inference.layers import Layer, Places, Rows, angles, rms_norm, run_layers
from tide_mega.inference.matrices import Matrix, has_int8, make_matrix
from tide_mega.inference.model_config import ModelShape
from tide_mega.kernels.compiled import compiled_step
from tide_mega.parallel.device import DTYPES

WEIGHTS = ("dtype", "int8")
_PASS_TOKENS = 512
"""Most tokens of a sequence per pass, which bounds a prompt's activations."""
_SMALLEST_EXTENT = 256
"""A compiled step attends to this many places of the cache, times a power of two."""


@dataclass
class DecodeStats:
    """Counters of a decoder."""

    prompt_tokens: int = 0
    tokens: int = 0
    """Tokens fed to steps."""
    steps: int = 0
    prompt_seconds: float = 0.0
    step_seconds: float = 0.0


@dataclass(frozen=True)
class Weights:
    """A model on its device."""

    shape: ModelShape
    embedding_VD: Tensor
    layers: list[Layer]
    final_gain_D: Tensor
    head: Matrix
    memory: MemoryStore | None


class Decoder:
    """B sequences that grow by one token per step, each with its own length."""

    def __init__(
        self, weights: Weights, device: torch.device, *, batch: int, max_length: int, compile: bool = False
    ) -> None:
        """Take weights whose layers hold a cache of `batch` sequences of `max_length` tokens."""
        self.weights = weights
        self.device = device
        self.batch, self.max_length = batch, max_length
        self.lengths: list[int] = []
        """Cached tokens of each sequence."""
        self.stats = DecodeStats()
        self.is_compiled = compile
        self._finished: set[int] = set()
        if compile:
            for layer in weights.layers:
                torch._dynamo.mark_static_address(layer.keys_BGSC)
                torch._dynamo.mark_static_address(layer.values_BGSC)
            self._compiled = compiled_step(partial(run_layers, weights.layers, weights.shape), device)
        dtype = weights.embedding_VD.dtype
        self._cos_SC, self._sin_SC = (x.to(device, dtype) for x in angles(weights.shape, max_length))
        self._place_S = torch.arange(max_length, device=device)
        self._sequence_B1 = torch.arange(batch, device=device)[:, None]

    @classmethod
    def open(
        cls,
        folder: ModelFolder | Path | str,
        *,
        device: torch.device | str = "cpu",
        dtype: str = "fp32",
        memory: str = "device",
        cache: float = 0.05,
        max_length: int | None = None,
        batch: int = 1,
        weights: str = "dtype",
        compile: bool = False,
    ) -> "Decoder":
        """Check a folder and load it.

        Args:
            folder: an exported folder, or a stock Llama one.
            device: where to compute.
            dtype: fp32 or bf16, of weights and computation.
            memory: device, host or disk: where the memory's rows are kept.
            cache: with memory=disk, the share of the rows kept in memory once read.
            max_length: most tokens of a sequence, prompt included; None means the model's maximum.
            batch: most sequences at a time.
            weights: dtype, or int8: matrices in 8 bits, on a CPU.
            compile: whether to compile the step with torch.compile, on CUDA with CUDA graphs.

        Raises:
            ConfigError: the folder does not exist, or has no memory that could stay on disk.
            FolderError: the folder cannot be used.
            ValueError: an argument has an unknown value.
        """
        at = torch.device(device)
        opened = folder if isinstance(folder, ModelFolder) else ModelFolder.open(folder)
        shape = opened.config.shape
        length = shape.max_positions if max_length is None else max_length
        if batch < 1 or not 1 <= length <= shape.max_positions:
            raise ValueError(
                f"a batch of {batch} of length {length}, and the model takes 1 to {shape.max_positions}"
            )
        if weights not in WEIGHTS or (weights == "int8" and (at.type != "cpu" or compile or not has_int8())):
            raise ValueError(f"weights={weights} is none of {', '.join(WEIGHTS)}, or not to be had on {at}")
        store = opened.open_memory(memory, cache, at)
        loader = _Loader(opened, at, DTYPES[dtype], batch, length, weights == "int8", compile)
        return cls(loader.load(store), at, batch=batch, max_length=length, compile=compile)

    @torch.inference_mode()
    def prefill(self, ids: Tensor | Sequence[Sequence[int]], lengths: Sequence[int] | None = None) -> Tensor:
        """Start over with a prompt for each sequence.

        Args:
            ids: [B, T], prompts left-aligned and padded with any ids; or a list of ids per prompt.
            lengths: tokens of each prompt; None means all T, or the lengths of the lists.

        Returns:
            Logits [B, V] of the token after each prompt.

        Raises:
            ValueError: no prompt or too many, an empty one, one longer than the cache, or an unknown id.
            GenerationError: rows of the memory cannot be read any more.
        """
        begin = time.perf_counter()
        ids_BT, lengths = _padded(ids, lengths)
        self._check_prompts(ids_BT, lengths)
        B = len(ids_BT)
        self.lengths, self._finished = [0] * B, set()
        ids_BT = ids_BT.to(self.device)
        if (store := self.weights.memory) is not None:
            with _readable():
                store.prefetch(torch.cat([ids_BT[b, :length] for b, length in enumerate(lengths)]))
        last_BD = torch.empty(B, self.weights.shape.hidden_size, dtype=self._dtype, device=self.device)
        for first in range(0, max(lengths), _PASS_TOKENS):
            part_BT = ids_BT[:, first : first + _PASS_TOKENS]
            T = part_BT.shape[1]
            hidden_BTD = self._pass(part_BT, [first] * B).view(B, T, -1)
            for b, length in enumerate(lengths):
                if first < length <= first + T:
                    last_BD[b] = hidden_BTD[b, length - 1 - first]
        self.lengths = list(lengths)
        logits_BV = self._logits(last_BD)
        self.stats.prompt_tokens += sum(lengths)
        self.stats.prompt_seconds += time.perf_counter() - begin
        return logits_BV

    @torch.inference_mode()
    def step(self, ids_B: Tensor) -> Tensor:
        """Append a token to each sequence; return the logits [B, V] of the next one.

        Finished sequences stay unchanged; their ids and logits are meaningless.

        Raises:
            ValueError: the number of ids is not that of sequences, or a sequence is full.
            GenerationError: rows of the memory cannot be read any more.
        """
        begin = time.perf_counter()
        B = len(self.lengths)
        if ids_B.shape != (B,):
            raise ValueError(f"ids of shape {list(ids_B.shape)} for {B} sequences")
        going = [b for b in range(B) if b not in self._finished]
        if any(self.lengths[b] >= self.max_length for b in going):
            raise ValueError(f"a sequence has {self.max_length} tokens, all that there is room for")
        ids_B1 = ids_B.to(self.device)[:, None]
        starts = [min(length, self.max_length - 1) for length in self.lengths]
        logits_BV = self._logits(self._pass(ids_B1, starts))
        for b in going:
            self.lengths[b] += 1
        self.stats.tokens += len(going)
        self.stats.steps += 1
        self.stats.step_seconds += time.perf_counter() - begin
        return logits_BV

    def finish(self, b: int) -> None:
        """Mark sequence `b` as finished."""
        self._finished.add(b)

    def close(self) -> None:
        """Close the memory's file."""
        if self.weights.memory is not None:
            self.weights.memory.close()

    @property
    def _dtype(self) -> torch.dtype:
        return self.weights.embedding_VD.dtype

    def _check_prompts(self, ids_BT: Tensor, lengths: Sequence[int]) -> None:
        B, T = ids_BT.shape
        if not 1 <= B <= self.batch or len(lengths) != B:
            raise ValueError(
                f"{B} prompts and {len(lengths)} lengths for a decoder of {self.batch} sequences"
            )
        if min(lengths) < 1 or max(lengths) > min(T, self.max_length):
            raise ValueError(
                f"prompts of {min(lengths)} to {max(lengths)} tokens; there is room for 1 to {self.max_length}"
            )
        V = self.weights.shape.vocab_size
        low, high = int(ids_BT.min()), int(ids_BT.max())
        if low < 0 or high >= V:
            raise ValueError(f"token ids lie in 0..{V - 1}, not in {low}..{high}")

    def _pass(self, ids_BT: Tensor, starts: list[int]) -> Tensor:
        """Run tokens at positions from `starts` on; return the hidden states [N, D]."""
        ids_N = ids_BT.reshape(-1)
        memory: Tensor | Rows | None = None
        if (store := self.weights.memory) is not None:
            with _readable():
                store.prefetch(ids_N)
            memory = partial(_rows, store, ids_N)
        is_compiled = self.is_compiled and ids_BT.shape[1] == 1
        if is_compiled and callable(memory):
            memory = memory()
        h_ND = self.weights.embedding_VD.index_select(0, ids_N)
        places = self._places(starts, ids_BT.shape[1], is_compiled)
        if is_compiled:
            return self._compiled(h_ND, places, memory)
        return run_layers(self.weights.layers, self.weights.shape, h_ND, places, memory)

    def _places(self, starts: list[int], T: int, is_compiled: bool) -> Places:
        extent = max(starts) + T
        if is_compiled:
            extent = min(self.max_length, max(_SMALLEST_EXTENT, 1 << (extent - 1).bit_length()))
        start_B1 = torch.tensor(starts, device=self.device)[:, None]
        position_BT = start_B1 + self._place_S[:T]
        needs_mask = T > 1 or is_compiled or min(starts) < max(starts)
        return Places(
            sequence_B1=self._sequence_B1[: len(starts)],
            position_BT=position_BT,
            cos_BT1C=self._cos_SC[position_BT].unsqueeze(2),
            sin_BT1C=self._sin_SC[position_BT].unsqueeze(2),
            visible_B1TS=(self._place_S[:extent] <= position_BT[:, None, :, None]) if needs_mask else None,
            extent=extent,
        )

    def _logits(self, h_BD: Tensor) -> Tensor:
        return self.weights.head(rms_norm(h_BD, self.weights.final_gain_D, self.weights.shape.norm_eps))


class _Loader:
    """Loads a folder's tensors as weights onto the device, one layer after the other."""

    def __init__(
        self,
        folder: ModelFolder,
        device: torch.device,
        dtype: torch.dtype,
        batch: int,
        max_length: int,
        int8: bool,
        for_compiler: bool,
    ) -> None:
        self._folder, self._shape = folder, folder.config.shape
        self._device, self._dtype = device, dtype
        self._cache_size = (batch, self._shape.num_groups, max_length, self._shape.head_size)
        self._make = partial(make_matrix, rows=batch, int8=int8, for_compiler=for_compiler)

    def load(self, memory: MemoryStore | None) -> Weights:
        """Read everything but the memory.

        Raises:
            FolderError: a file can no longer be read.
        """
        embedding_VD = self._tensor("model.embed_tokens.weight")
        is_tied = self._shape.tie_embeddings
        output_VD = embedding_VD if is_tied else self._tensor("lm_head.weight")
        return Weights(
            shape=self._shape,
            embedding_VD=embedding_VD,
            layers=[self._layer(number) for number in range(self._shape.num_layers)],
            final_gain_D=self._tensor("model.norm.weight"),
            head=self._make(output_VD, is_shared=is_tied),
            memory=memory,
        )

    def _layer(self, number: int) -> Layer:
        prefix = f"model.layers.{number}."
        names = [prefix + name for name in layer_shapes(self._folder.config)]
        read = self._folder.tensors(sorted(names, key=self._folder.files.__getitem__))
        found = {name.removeprefix(prefix).removesuffix(".weight"): self._placed(x) for name, x in read}
        query_key_value = torch.cat([found[f"self_attn.{part}_proj"] for part in "qkv"])
        gate_up = torch.cat([found["mlp.gate_proj"], found["mlp.up_proj"]])
        return Layer(
            attention_gain_D=found["input_layernorm"],
            query_key_value=self._make(query_key_value),
            output=self._make(found["self_attn.o_proj"]),
            ffn_gain_D=found["post_attention_layernorm"],
            gate_up=self._make(gate_up),
            down=self._make(found["mlp.down_proj"]),
            router_JD=found["router"].float() if "router" in found else None,
            keys_BGSC=self._empty_cache(),
            values_BGSC=self._empty_cache(),
        )

    def _tensor(self, name: str) -> Tensor:
        return self._placed(self._folder.tensor(name))

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype)

    def _empty_cache(self) -> Tensor:
        # Zeros: masked places get an attention weight of 0, but 0 times uninitialised memory may be NaN.
        return torch.zeros(self._cache_size, device=self._device, dtype=self._dtype)


def _padded(
    ids: Tensor | Sequence[Sequence[int]], lengths: Sequence[int] | None
) -> tuple[Tensor, Sequence[int]]:
    if isinstance(ids, Tensor):
        return ids, [ids.shape[1]] * len(ids) if lengths is None else lengths
    lengths = [len(one) for one in ids]
    ids_BT = torch.zeros(len(ids), max(lengths, default=0), dtype=torch.int64)
    for b, one in enumerate(ids):
        ids_BT[b, : len(one)] = torch.tensor(one, dtype=torch.int64)
    return ids_BT, lengths


def _rows(store: MemoryStore, ids_N: Tensor) -> Tensor:
    with _readable():
        return store.rows(ids_N, torch.float32)


@contextmanager
def _readable() -> Iterator[None]:
    """Context that turns errors of the memory's file, intact when opened, into GenerationErrors."""
    try:
        yield
    except SidecarError as error:
        raise GenerationError(f"{error}. What was written until now is right.") from error
