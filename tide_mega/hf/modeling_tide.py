"""TIDE (arXiv 2605.06216) for transformers: Llama whose layers also read a memory by token id.

Everything but the memory is Llama's. The rows of all tokens are gathered once, before the layers, and passed down
to them: layer l adds m = sum_k alpha_k M_k(v), alpha = softmax(W_r n), to its residual stream (paper, 3.3 to 3.6).

Shapes: B batch, T tokens, N = B T, K memory blocks, J = K + 1, D hidden size, V vocabulary.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)
from transformers.utils.hub import cached_file

# transformers before 5.12 fetches only the files imported here, not those they import in turn.
from .configuration_tide import TideConfig
from .memory_tide import MemoryStore, TensorStore, open_store, rows_of_parts
from .rows_tide import TRAINED_KINDS, RowFormat, finished, part_bounds
from .sidecar_tide import SidecarError
from .tokens_tide import check_vocabulary

_HUB_KEYS = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download")


class TideMemory(nn.Module):
    """M(v) of every token type, from trained tables with their norm, finished rows, or a file."""

    def __init__(self, config: TideConfig) -> None:
        super().__init__()
        self.config = config
        K, D = config.num_memory_blocks, config.hidden_size
        self.format = RowFormat(config.memory_format, K, D, config.memory_rank)
        self.is_trained = config.memory_file is None and config.memory_format in TRAINED_KINDS
        self.store: MemoryStore | None = None
        self.tables = nn.ParameterList()
        self.gains: nn.Parameter | None = None
        if config.memory_file is not None:
            return
        bounds = part_bounds(config.vocab_size, config.memory_part_rows)
        if self.is_trained:
            self.gains = nn.Parameter(torch.ones(K, D))
            for first, last in bounds:
                self.tables.append(nn.Parameter(torch.empty(last - first, K, D)))
            return
        for number, (first, last) in enumerate(bounds):
            self.register_buffer(f"records_{number}", self.format.zero_records(last - first))
        if self.format.basis_shape is not None:
            self.register_buffer("basis", torch.zeros(self.format.basis_shape))

    @property
    def parts(self) -> list[Tensor]:
        """The tensors that the rows are split into, in order."""
        if self.is_trained:
            return list(self.tables)
        return [buffer for name, buffer in self.named_buffers(recurse=False) if name.startswith("records_")]

    @property
    def num_rows(self) -> int:
        """Token types with a row."""
        return sum(map(len, self.parts)) if self.config.memory_file is None else self.config.vocab_size

    def forward(self, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return M [B, T, K, D] of the tokens [B, T]."""
        ids_N = input_ids.flatten()
        if self.config.memory_file is not None:
            rows_NKD = self._stored_rows(ids_N, dtype)
        elif self.gains is not None:
            rows_NKD = finished(rows_of_parts(self.parts, ids_N), self.gains, self.config.rms_norm_eps, dtype)
        else:
            rows_NKD = self.format.decode(
                rows_of_parts(self.parts, ids_N), dtype, getattr(self, "basis", None)
            )
        return rows_NKD.unflatten(0, input_ids.shape)

    @torch.compiler.disable
    def _stored_rows(self, ids_N: Tensor, dtype: torch.dtype) -> Tensor:
        return self.opened(ids_N.device).rows(ids_N, dtype)

    def opened(self, device: torch.device | None = None) -> MemoryStore:
        """Return the file's store; locates the file again if the model was copied or built without one."""
        if self.store is None:
            self.open(self.config._name_or_path, device)
        assert self.store is not None
        return self.store

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the store: a copy of the model, or another process, opens the file itself."""
        return {**self.__dict__, "store": None}

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> "TideMemory":
        """Also move the rows of a store on the device, for `to`, `cuda` and others."""
        if isinstance(self.store, TensorStore):
            self.store.parts = [fn(part) for part in self.store.parts]
        return super()._apply(fn, *args, **kwargs)

    def open(self, folder: str | Path, device: torch.device | None = None, **kwargs: Any) -> None:
        """Locate the file beside the weights, in a folder or on the hub, check it and open it.

        With memory_store=device its rows are read onto `device`.

        Raises:
            SidecarError: it is missing, damaged, or another model's.
        """
        try:
            path = cached_file(str(folder), self.config.memory_file, **kwargs)
        except OSError as error:
            raise SidecarError(
                f"{folder} has no {self.config.memory_file}, the file with this model's memory: copy it there "
                "too, or export with memory=inline"
            ) from error
        self.store = open_store(
            Path(path),
            self.format,
            rows=self.config.vocab_size,
            fingerprint=self.config.memory_fingerprint,
            place=self.config.memory_store,
            cache=self.config.memory_cache,
            device=device,
        )

    def require_size(self, rows: int) -> None:
        """Refuse to resize a file.

        Raises:
            ValueError: the file has a different number of rows.
        """
        if self.config.memory_file is not None and rows != self.num_rows:
            raise ValueError(
                f"the memory of this model is a file of {self.num_rows} rows, one a token, and the vocabulary "
                f"cannot become {rows}: export it with memory=inline to resize it"
            )

    @torch.no_grad()
    def resize(self, rows: int) -> None:
        """Append rows, initialised like trainable ones (0 for finished ones), or truncate."""
        old = torch.cat(self.parts)[:rows]
        extra = rows - len(old)
        if self.is_trained:
            new = old.new_empty(extra, *old.shape[1:]).normal_(0, self.config.initializer_range)
        else:
            new = self.format.zero_records(extra, old.device)
        parts = [part.clone() for part in torch.cat((old, new)).split(self.config.memory_part_rows)]
        if self.is_trained:
            self.tables = nn.ParameterList([nn.Parameter(part) for part in parts])
            return
        for number in range(len(self.parts)):
            delattr(self, f"records_{number}")
        for number, part in enumerate(parts):
            self.register_buffer(f"records_{number}", part)


class TideDecoderLayer(LlamaDecoderLayer):
    """Llama's layer, which also adds its router's mixture of the memory rows."""

    def __init__(self, config: TideConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.router = nn.Linear(config.hidden_size, config.num_memory_blocks + 1, bias=False)

    def __call__(self, hidden_states: Tensor, *, tide_memory: Tensor, **kwargs: Any) -> Tensor:
        """Pass M positionally: activation checkpointing propagates gradients only through positional tensors."""
        return super().__call__(hidden_states, tide_memory, **kwargs)

    def forward(self, hidden_states: Tensor, tide_memory: Tensor, **kwargs: Any) -> Tensor:
        """See LlamaDecoderLayer; `tide_memory` is M [B, T, K, D]."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        alpha_BTJ = self.router(normed).softmax(-1)
        m_BTD = (alpha_BTJ[..., None, :-1] @ tide_memory).squeeze(-2)
        return hidden_states + self.mlp(normed) + m_BTD


class TidePreTrainedModel(LlamaPreTrainedModel):
    """Base class of TIDE's two models."""

    config: TideConfig
    config_class = TideConfig
    _no_split_modules: ClassVar = ["TideDecoderLayer"]
    _can_record_outputs: ClassVar = {
        "hidden_states": TideDecoderLayer,
        "attentions": LlamaPreTrainedModel._can_record_outputs["attentions"],
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TideMemory):
            for table in module.tables:
                init.normal_(table, mean=0.0, std=self.config.initializer_range)
            if module.gains is not None:
                init.ones_(module.gains)

    @property
    def tide_memory(self) -> TideMemory | None:
        """The memory's module; None if K = 0."""
        return getattr(self.base_model, "memory", None)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """See PreTrainedModel; checks tokenizer and memory beside the weights before returning the model.

        Raises:
            TokenizerError: the folder's tokenizer is another model's.
            SidecarError: the file with the memory is missing, damaged, or another model's.
        """
        found = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        if pretrained_model_name_or_path is not None:
            check_vocabulary(Path(pretrained_model_name_or_path), model.config.vocabulary_fingerprint)
            if model.tide_memory is not None and model.config.memory_file is not None:
                hub = {key: kwargs[key] for key in _HUB_KEYS if key in kwargs}
                device = model.get_input_embeddings().weight.device
                model.tide_memory.open(pretrained_model_name_or_path, device, **hub)
        return found

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """See PreTrainedModel; also copies the memory's file, if any.

        Raises:
            ValueError: `push_to_hub` is set, which would omit that file.
        """
        memory = self.tide_memory if self.config.memory_file is not None else None
        if memory is not None and kwargs.get("push_to_hub"):
            raise ValueError(
                f"push_to_hub would leave {self.config.memory_file} out: call model.push_to_hub(...) after it, or "
                "upload the saved folder"
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        if memory is not None:
            memory.opened().copy_file(Path(save_directory) / str(self.config.memory_file))

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Embedding:
        """See PreTrainedModel; resizes the memory likewise.

        Raises:
            ValueError: the memory is a file, which cannot grow.
        """
        memory = self.tide_memory
        if memory is not None and new_num_tokens is not None:
            memory.require_size(new_num_tokens)
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if memory is not None and embedding.num_embeddings != memory.num_rows:
            memory.resize(embedding.num_embeddings)
        return embedding


class TideModel(TidePreTrainedModel, LlamaModel):
    """The model without the output matrix."""

    def __init__(self, config: TideConfig) -> None:
        super().__init__(config)
        if config.num_memory_blocks:
            self.memory = TideMemory(config)
            self.layers = nn.ModuleList(
                [TideDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)]
            )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """See LlamaModel.

        Raises:
            ValueError: embeddings are given without their token ids.
        """
        if self.config.num_memory_blocks and inputs_embeds is not None:
            raise ValueError(
                "TIDE reads its memory by token id: give input_ids; inputs_embeds, which have no ids, cannot be "
                "used"
            )
        if self.config.num_memory_blocks and input_ids is not None:
            kwargs["tide_memory"] = self.memory(input_ids, self.embed_tokens.weight.dtype)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class TideForCausalLM(TidePreTrainedModel, LlamaForCausalLM):
    """The language model."""

    def __init__(self, config: TideConfig) -> None:
        super().__init__(config)
        self.model = TideModel(config)
        if config.memory_file is not None:
            self._can_compile_fullgraph = False  # rows are read from the file between graphs
        self.post_init()
