"""The memory of one process: the tables or its share of them, and the rows that a step's layers read.

`Memory` is the only door to all of it: around a pipeline schedule it brings the step's rows to every stage and
their gradient back to the tables, and it is what layers read and report to. `MemoryBlocks` holds the parameters,
on the first stage.

Dimensions: U distinct token types of the step, K memory blocks, J = K + 1, D hidden size, W rows of the tables on
this rank, L layers, S tokens of the sequence on this rank, B sequences, T tokens.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tide_mega.config.schema import TideConfig
from tide_mega.kernels.choice import choose_kernels
from tide_mega.kernels.row_gradient import RowGradient
from tide_mega.kernels.row_norm import row_norm
from tide_mega.memory.exchange import gather_rows
from tide_mega.memory.owned import Fetch, OwnedTables
from tide_mega.memory.plan import MemoryPlan, plan_rows
from tide_mega.memory.traffic import TrafficMeter
from tide_mega.parallel.groups import ParallelGroups, sum_over


class MemoryBlocks(nn.Module):
    """K MemoryBlocks, M_k(v) = RMSNorm(E_k[v]) (paper 3.3).

    With a `group` the tables are a parameter, sharded by rows over that tensor-parallel group. Without one, their
    rows are owned outside the model (`tide_mega.memory.owned`) and only the gains of the norms live here.
    """

    def __init__(
        self,
        num_blocks: int,
        vocab_size: int,
        width: int,
        norm_eps: float,
        norm_version: str,
        group: ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.norm_version = norm_version
        self.group = group
        self.norm_eps = norm_eps
        self.tables_WKD: nn.Parameter | None = None
        if group is not None:
            self.tables_WKD = nn.Parameter(torch.empty(vocab_size // group.size(), num_blocks, width))
            # With this attribute DeepSpeed counts the parameter on every model-parallel rank instead of once.
            self.tables_WKD.tensor_model_parallel = group.size() > 1  # type: ignore[attr-defined]
        self.gains_KD = nn.Parameter(torch.ones(num_blocks, width))

    def forward(self, ids_U: Tensor, rows_UKD: Tensor | None = None) -> Tensor:
        """Return the normalised rows M [U, K, D] of distinct ids, in the tables' dtype.

        Args:
            ids_U: distinct ids, ascending.
            rows_UKD: their rows, if the tables are owned outside the model.
        """
        if rows_UKD is None:
            if self.tables_WKD is None or self.group is None:
                raise RuntimeError("tables owned outside the model: give their rows")
            rows_UKD = gather_rows(self.tables_WKD, ids_U, self.group)
        return row_norm(self.norm_version, rows_UKD, self.gains_KD, self.norm_eps)


@dataclass(frozen=True)
class Request:
    """Rows asked for: the plan and, if tables have owners, the fetch in flight."""

    plan: MemoryPlan
    fetch: Fetch | None


@dataclass
class _Origin:
    """Where a reading's rows come from on the first stage, for the way back of their gradient."""

    memory_UKD: Tensor
    rows_UKD: Tensor | None
    fetch: Fetch | None


class Memory:
    """The EmbeddingMemory as one process has it, on every stage and with K = 0 too.

    A plain object, so that the layers that refer to it do not own its parameters: the stage registers `blocks`
    as its own.

    `rows_UKD` stays unchanged for all micro-batches of a reading, so recompute finds the same values. Each layer's
    backward pass adds its part of their gradient to `sink`, and the sum is sent to the tables once, after the last
    micro-batch. Which row each token reads is not kept here: that travels through the model with the hidden
    state.
    """

    def __init__(
        self,
        config: TideConfig,
        groups: ParallelGroups,
        meter: TrafficMeter,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Make the first stage's tables, of values yet to be set; `dtype` is the model's."""
        model, memory, parallel = config.model, config.memory, config.parallel
        self.groups, self.meter, self.dtype = groups, meter, dtype
        self.kernels = choose_kernels(config.kernels, device, memory.num_blocks)
        self.num_layers, self.num_blocks = model.num_layers, memory.num_blocks
        self.block_shape = (memory.num_blocks, model.hidden_size)
        self.chunk_layers = model.num_layers // (parallel.pipeline * parallel.virtual_pipeline)
        self.vocab_size = model.vocab_size
        self.sequence_parallel = parallel.sequence_parallel
        self.blocks: MemoryBlocks | None = None
        """On the first stage."""
        self.owned: OwnedTables | None = None
        """The rows that this process owns outside the model, if each row has one owner."""
        self.rows_UKD: Tensor | None = None
        """M of the running reading."""
        self.sink: RowGradient | None = None
        """None if no gradient is wanted."""
        self.alpha_L: dict[int, list[Tensor]] | None = None
        """If a dictionary, each layer appends its router weights [S, B, J] of each micro-batch, the null bank
        last, under its index from 0."""
        self.silenced: frozenset[int] = frozenset()
        """Layers, from 0, that skip the memory (paper, appendix H)."""
        self._rows_of: Callable[[Tensor], Tensor] | None = None
        self._origin: _Origin | None = None
        if memory.num_blocks and groups.is_first_stage:
            outside = memory.owners == "tensor_data"
            self.blocks = MemoryBlocks(
                memory.num_blocks,
                model.vocab_size,
                model.hidden_size,
                model.norm_eps,
                self.kernels.row_norm,
                None if outside else groups.memory,
            ).to(dtype)
            if outside:
                self.owned = OwnedTables(
                    memory.num_blocks,
                    model.vocab_size,
                    model.hidden_size,
                    dtype=dtype,
                    device=device,
                    optim=config.optim,
                    groups=groups,
                    meter=self.meter,
                    kernel=self.kernels.mix,
                )

    def request(self, tokens_MBT: list[Tensor]) -> Request:
        """Plan one reading for these micro-batches and start moving its rows; collective over their owners.

        May be made before the reading's step, once the tables are updated.

        Raises:
            IndexError: an id is outside the tables.
        """
        plan = self.plan(tokens_MBT)
        return Request(plan, None if self.owned is None else self.owned.fetch(plan))

    def plan(self, tokens_MBT: list[Tensor]) -> MemoryPlan:
        """Plan one reading for these micro-batches; collective over the rows' owners.

        Raises:
            IndexError: an id is outside the tables.
        """
        return plan_rows(tokens_MBT, self.vocab_size, None if self.owned is None else self.owned.owners)

    @contextmanager
    def read(self, request: Request, *, wants_gradient: bool) -> Iterator[None]:
        """Have the rows at hand within: gathered, normalised and broadcast to the stages; collective.

        Rows are normalised before the broadcast, on the first stage, where the gains live: with the same result as
        after it, but once instead of on every stage, and with a single gradient for each gain.

        Args:
            request: of this replica's micro-batches.
            wants_gradient: whether the layers' backward passes leave a gradient.
        """
        try:
            self._origin = self._fetched(request, wants_gradient) if self.groups.is_first_stage else None
            self.rows_UKD = self._on_this_stage(request.plan.ids_U)
            if wants_gradient:
                rows = self.rows_UKD
                self.sink = RowGradient(rows.shape, rows.device, self.kernels.mix, self.chunk_layers)
            yield
        finally:
            self.rows_UKD = self.sink = self._origin = None

    def _fetched(self, request: Request, wants_gradient: bool) -> _Origin:
        ids_U = request.plan.ids_U
        if self._rows_of is not None:
            return _Origin(self._checked(self._rows_of(ids_U), ids_U), None, None)
        assert self.blocks is not None
        rows_UKD = None
        if self.owned is not None and request.fetch is not None:
            rows_UKD = self.owned.rows_of(request.fetch).requires_grad_(wants_gradient)
        memory_UKD = self.blocks(ids_U, rows_UKD)
        if self.owned is None and self.groups.tensor_size > 1:
            self.meter.add_sum("rows", memory_UKD, self.groups.tensor_size)
        return _Origin(memory_UKD, rows_UKD, request.fetch)

    def _checked(self, memory_UKD: Tensor, ids_U: Tensor) -> Tensor:
        expected = (ids_U.numel(), *self.block_shape)
        if tuple(memory_UKD.shape) != expected or memory_UKD.dtype != self.dtype:
            raise ValueError(
                f"the rows read instead of the memory are {list(memory_UKD.shape)} in {memory_UKD.dtype}: they "
                f"must be {list(expected)} in {self.dtype}"
            )
        return memory_UKD

    def _on_this_stage(self, ids_U: Tensor) -> Tensor:
        pipeline = self.groups.pipeline
        if self._origin is not None:
            travelling = self._origin.memory_UKD.detach()
        else:
            shape = (ids_U.numel(), *self.block_shape)
            travelling = torch.empty(shape, dtype=self.dtype, device=ids_U.device)
        if pipeline.size() > 1:
            travelling = travelling.contiguous()
            dist.broadcast(travelling, src=dist.get_global_rank(pipeline, 0), group=pipeline)
            self.meter.add_broadcast("rows", travelling, pipeline.size(), is_root=self.groups.is_first_stage)
        return travelling

    def send_gradients(self) -> None:
        """Send the gradient that the layers of all stages left back to the norms and tables; collective.

        Raises:
            RuntimeError: no layer has read the memory.
        """
        groups = self.groups
        if self.sink is None or self.sink.is_empty:
            raise RuntimeError("no layer has read the memory: send_gradients belongs after the backward pass")
        gradient_UKD = self.sink.total()
        if groups.pipeline.size() > 1:
            sum_over(groups.pipeline, gradient_UKD)
            self.meter.add_sum("row gradients", gradient_UKD, groups.pipeline.size())
        if (origin := self._origin) is None:
            return
        if self.sequence_parallel:
            # Each tensor rank has seen only its slice of the tokens.
            sum_over(groups.tensor, gradient_UKD)
            self.meter.add_sum("row gradients", gradient_UKD, groups.tensor_size)
        origin.memory_UKD.backward(gradient_UKD.to(origin.memory_UKD.dtype))
        if self.owned is not None and origin.fetch is not None and origin.rows_UKD is not None:
            assert origin.rows_UKD.grad is not None
            self.owned.add_gradient(origin.fetch, origin.rows_UKD.grad)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the layers' router weights within, for `null_weights` and `router_weights`."""
        before, self.alpha_L = self.alpha_L, {}
        try:
            yield
        finally:
            self.alpha_L = before

    @contextmanager
    def silencing(self, layers: Iterable[int]) -> Iterator[None]:
        """Leave the memory out of these layers within."""
        before, self.silenced = self.silenced, frozenset(layers)
        try:
            yield
        finally:
            self.silenced = before

    @contextmanager
    def reading_from(self, rows_of: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Let readings within have what `rows_of` gives, M [U, K, D] of distinct ids [U], instead of the rows."""
        before, self._rows_of = self._rows_of, rows_of
        try:
            yield
        finally:
            self._rows_of = before

    def record_alpha(self, layer: int, alpha_SBJ: Tensor) -> None:
        """Record a layer's router weights, if recording is on."""
        if self.alpha_L is not None:
            self.alpha_L.setdefault(layer, []).append(alpha_SBJ)

    def null_weights(self) -> Tensor:
        """Return the null-bank weights that the layers of all stages recorded [L, B, T]; collective.

        T covers whole sequences; B counts those of all micro-batches since recording began.
        """
        slices = {
            layer: torch.cat([alpha_SBJ[..., -1] for alpha_SBJ in of_layer], dim=1)
            for layer, of_layer in (self.alpha_L or {}).items()
        }
        like_SB = next(iter(slices.values()))
        whole_LSB = like_SB.new_zeros(self.num_layers, *like_SB.shape)
        for layer, null_SB in slices.items():
            whole_LSB[layer] = null_SB
        if self.groups.pipeline.size() > 1:
            dist.all_reduce(whole_LSB, group=self.groups.pipeline)
        if self.sequence_parallel:
            whole_SLB = tensor_parallel.gather_from_sequence_parallel_region(
                whole_LSB.transpose(0, 1).contiguous(), group=self.groups.tensor
            )
            whole_LSB = whole_SLB.transpose(0, 1)
        return whole_LSB.transpose(1, 2)

    def router_weights(self) -> Iterator[Tensor]:
        """Yield the router weights that this process's layers recorded, of each micro-batch [L, B, T, J]."""
        by_layer = [of_layer for _, of_layer in sorted((self.alpha_L or {}).items())]
        for of_microbatch in zip(*by_layer, strict=True):
            yield torch.stack(of_microbatch).transpose(1, 2)
