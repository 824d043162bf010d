"""Tables whose rows each have one owner among tensor x data ranks, which alone stores, serves and updates them.

The owner keeps a dense fp32 gradient and tracks which of its rows are not 0: a step touches few rows of a large
table (at 2,048 tokens about 8 % of 8,192). Only those are accumulated, measured, scaled and cleared; the others
stay 0 from step to step, and dense AdamW reads the whole gradient once.

Dimensions: W rows owned here, Q rows received, U rows of a replica's step, K memory blocks, D width, G askers.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tide_mega.config.schema import OptimConfig
from tide_mega.kernels.row_sum import add_rows
from tide_mega.memory.exchange import Owners, PendingRows, Route, share
from tide_mega.memory.ownership import rows_of_owner
from tide_mega.memory.plan import MemoryPlan
from tide_mega.memory.ranges import row_squares, sum_by_block
from tide_mega.memory.traffic import TrafficMeter
from tide_mega.parallel.groups import ParallelGroups


class TableGradient:
    """The gradient of the owned rows, summed over readings and askers until the optimizer has used it."""

    def __init__(self, like_WKD: Tensor, version: str) -> None:
        """Start from 0; `version` is the kernel that accumulates rows: naive, cpu or triton."""
        self.sum_WKD = torch.zeros_like(like_WKD, requires_grad=False)
        self._version = version
        self._touched: list[Tensor] = []
        self._askers = 0

    def add(self, rows_Q: Tensor, received_QKD: Tensor, counts_G: list[int], replicas: int) -> None:
        """Add the received gradients over `replicas`, for the mean; see `tide_mega.kernels.row_sum.add_rows`."""
        add_rows(self._version, self.sum_WKD, rows_Q, received_QKD, counts_G, replicas)
        self._touched.append(rows_Q)
        self._askers += sum(count > 0 for count in counts_G)

    def square_norms(self) -> Tensor:
        """Return the sum of squares of each block [K], fp64; without host synchronisation."""
        blocks, width = self.sum_WKD.shape[1:]
        if (rows_Q := self._few()) is None:
            _, squares_U = row_squares(self.sum_WKD.view(-1), 0, width)
            return sum_by_block(0, squares_U, blocks)
        if not rows_Q.numel():
            return torch.zeros(blocks, dtype=torch.float64, device=rows_Q.device)
        is_new_Q1 = None
        if self._askers > 1:  # several may have touched the same row, which counts once
            rows_Q = rows_Q.sort().values
            is_new_Q1 = torch.ones_like(rows_Q, dtype=torch.bool)[:, None]
            is_new_Q1[1:, 0] = rows_Q[1:] != rows_Q[:-1]
        squares_QK = torch.linalg.vector_norm(self.sum_WKD[rows_Q], dim=2).double().square()
        return (squares_QK if is_new_Q1 is None else torch.where(is_new_Q1, squares_QK, 0.0)).sum(0)

    def scale_(self, factor: float) -> None:
        """Multiply by `factor` in place."""
        if (rows_Q := self._few()) is None:
            self.sum_WKD.mul_(factor)
        else:
            self.sum_WKD[rows_Q] = self.sum_WKD[rows_Q] * factor  # repeated rows are written the same value

    def clear(self) -> None:
        """Reset to 0."""
        if (rows_Q := self._few()) is None:
            self.sum_WKD.zero_()
        else:
            self.sum_WKD.index_fill_(0, rows_Q, 0.0)
        self._touched, self._askers = [], 0

    def _few(self) -> Tensor | None:
        """Return the rows that may be non-zero, possibly repeated; None if going through all rows costs less."""
        if sum(rows_Q.numel() for rows_Q in self._touched) > len(self.sum_WKD) // 2:
            return None
        if len(self._touched) != 1:
            empty = torch.empty(0, dtype=torch.int64, device=self.sum_WKD.device)
            return torch.cat([empty, *self._touched])
        return self._touched[0]


@dataclass
class Fetch:
    """A reading in flight; its route also serves to return the gradients."""

    route: Route
    pending: PendingRows | None
    """None once the rows have been taken."""
    distinct: int
    """U: distinct rows of the whole replica's step."""


class OwnedTables:
    """The fp32 master rows [W, K, D] and AdamW moments of this owner.

    Dense AdamW semantics: every row and every moment decays in every step, as in the paper's optimizer. A
    replica's tensor ranks each ask for an equal share of its rows and all-gather the shares; data parallelism
    needs no reduction of tables at all.
    """

    def __init__(
        self,
        num_blocks: int,
        vocab_size: int,
        width: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        optim: OptimConfig,
        groups: ParallelGroups,
        meter: TrafficMeter,
        kernel: str,
    ) -> None:
        """Create rows of 0; `kernel` is the version that accumulates gradients: naive, cpu or triton."""
        self.groups, self.group, self.meter, self.dtype = groups, groups.memory, meter, dtype
        self.vocab_size = vocab_size
        self.rows = rows_of_owner(vocab_size, self.group.size())
        self.master_WKD = torch.zeros(self.rows, num_blocks, width, device=device, requires_grad=True)
        self.gradient = TableGradient(self.master_WKD, kernel)
        decay = optim.weight_decay if optim.table_weight_decay is None else optim.table_weight_decay
        self.multiplier = optim.table_lr_multiplier
        self.optimizer = torch.optim.AdamW(
            [self.master_WKD],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=decay,
            fused=True,
        )

    @property
    def owners(self) -> Owners:
        """What a step's plan needs to know of the exchange."""
        return Owners(self.group, self.groups.tensor)

    @property
    def gradient_WKD(self) -> Tensor:
        """The gradient of the owned rows until the next update, not a copy."""
        return self.gradient.sum_WKD

    def fetch(self, plan: MemoryPlan) -> Fetch:
        """Request the replica's distinct ids and start moving their rows; collective over the owners.

        Args:
            plan: made for these `owners`.

        Raises:
            ValueError: the plan was made without owners.
        """
        if plan.asked is None:
            raise ValueError("the plan knows no owners: make it with plan_rows(..., owners=tables.owners)")
        first, last = share(plan.ids_U.numel(), self.groups.tensor)
        route = Route.plan(plan.ids_U[first:last], self.group, plan.asked, self.meter)
        owned_QKD = self.master_WKD.detach()[route.rows_Q].to(self.dtype)
        return Fetch(route, route.fetch(owned_QKD, self.meter), plan.ids_U.numel())

    def rows_of(self, fetch: Fetch) -> Tensor:
        """Take the rows [U, K, D] that a fetch brought for the whole replica, in the model's dtype.

        Raises:
            RuntimeError: they were taken before; a fetch keeps no rows, so that they can be freed.
        """
        if fetch.pending is None:
            raise RuntimeError("the rows of this fetch were taken before")
        rows_SKD, fetch.pending = fetch.pending.wait(), None
        members = self.groups.tensor_size
        if members == 1:
            return rows_SKD
        each = math.ceil(fetch.distinct / members)
        padded = rows_SKD.new_zeros(each, *rows_SKD.shape[1:])
        padded[: len(rows_SKD)] = rows_SKD
        whole = padded.new_empty(each * members, *padded.shape[1:])
        dist.all_gather_into_tensor(whole, padded, group=self.groups.tensor)
        self.meter.add_gather("rows", whole, members)
        return whole[: fetch.distinct]

    def add_gradient(self, fetch: Fetch, grad_UKD: Tensor) -> None:
        """Send a replica's full gradient (equal on its tensor ranks) to the owners, which sum it in fp32."""
        first, last = share(fetch.distinct, self.groups.tensor)
        received_QKD = fetch.route.give_back(grad_UKD[first:last], self.meter)
        route = fetch.route
        self.gradient.add(route.rows_Q, received_QKD, route.asked.by, self.groups.data_size)

    def square_norm(self) -> Tensor:
        """Return the sum of squares of the owned rows' gradient, fp64."""
        return self.square_norms().sum()

    def square_norms(self) -> Tensor:
        """Return the sum of squares of each block [K], fp64."""
        return self.gradient.square_norms()

    def step(self, lr: float, scale: float) -> None:
        """Update every row with the gradient times `scale` (the global clip factor)."""
        self.optimizer.param_groups[0]["lr"] = lr * self.multiplier
        if scale != 1.0:
            self.gradient.scale_(scale)
        self.master_WKD.grad = self.gradient_WKD
        self.optimizer.step()
        self.drop_gradient()

    def drop_gradient(self) -> None:
        """Discard the gradient of a skipped step; rows and moments stay unchanged."""
        self.master_WKD.grad = None
        self.gradient.clear()

    def kept(self) -> dict[str, Tensor]:
        """Return master rows and AdamW moments [W, K, D] by name, not copies; moments not yet created are 0."""
        state = self._moments()
        return {
            "master": self.master_WKD.detach(),
            "exp_avg": state["exp_avg"],
            "exp_avg_sq": state["exp_avg_sq"],
        }

    @property
    def updates(self) -> int:
        """AdamW's update count."""
        return int(self._moments()["step"])

    @updates.setter
    def updates(self, count: int) -> None:
        self._moments()["step"].fill_(count)

    def _moments(self) -> dict[str, Tensor]:
        state = self.optimizer.state[self.master_WKD]
        if not state:
            zeros = torch.zeros_like(self.master_WKD, requires_grad=False)
            state.update(exp_avg=zeros, exp_avg_sq=zeros.clone())
            state["step"] = torch.zeros((), dtype=torch.float32, device=zeros.device)
        return state
