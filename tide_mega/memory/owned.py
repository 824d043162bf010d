"""Tables whose rows each have one owner among tensor x data: fetched, updated and kept by it alone.

Shapes: V vocabulary, W rows owned here, U distinct types of this replica's step, S rows of this process's share
of them, K blocks, D width.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tide_mega.config.schema import OptimConfig
from tide_mega.memory.meter import TrafficMeter
from tide_mega.memory.plan import MemoryPlan
from tide_mega.memory.route import Owners, PendingRows, Route, share
from tide_mega.memory.table_gradient import TableGradient
from tide_mega.parallel.groups import ParallelGroups


@dataclass
class Fetch:
    """A reading under way: the route stays for the gradients' way back."""

    route: Route
    pending: PendingRows
    distinct: int
    """U: rows of the whole replica's step."""


class OwnedTables:
    """The fp32 master rows [W, K, D] and AdamW moments of this owner.

    Dense AdamW semantics: every row decays and every moment fades in every step, as in the paper's optimizer.
    A replica's tensor ranks each ask for an equal share of its rows and gather the shares; data parallelism
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
        """Make rows of 0; `kernel` is the version that adds gradients up: naive, cpu or triton."""
        self.groups, self.group, self.meter, self.dtype = groups, groups.memory, meter, dtype
        self.vocab_size = vocab_size
        self.rows = math.ceil(vocab_size / self.group.size())
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
        """What a step's plan must know of the exchange."""
        return Owners(self.group, self.groups.tensor)

    @property
    def gradient_WKD(self) -> Tensor:
        """The gradient of the rows owned here, until the next update: the memory itself."""
        return self.gradient.sum_WKD

    def fetch(self, plan: MemoryPlan) -> Fetch:
        """Ask for the replica's distinct ids and start moving rows; collective over the owners.

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
        """Return the rows [U, K, D] a fetch brought, the whole replica's, in the model's dtype."""
        rows_SKD = fetch.pending.wait()
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
        """Take a replica's whole gradient of its rows (equal on its tensor ranks) home and add it up in fp32."""
        first, last = share(fetch.distinct, self.groups.tensor)
        received_QKD = fetch.route.give_back(grad_UKD[first:last], self.meter)
        route = fetch.route
        self.gradient.add(route.rows_Q, received_QKD, route.asked.by, self.groups.data_size)

    def square_norm(self) -> Tensor:
        """Sum of squares of the gradient of the rows owned here, fp64."""
        return self.square_norms().sum()

    def square_norms(self) -> Tensor:
        """Return the same sum for each block [K]."""
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
        """Forget the gradient; a step that is skipped leaves the rows as they are."""
        self.master_WKD.grad = None
        self.gradient.clear()

    def kept(self) -> dict[str, Tensor]:
        """Return the master rows and AdamW's moments [W, K, D] themselves, by name; moments not made yet as 0."""
        state = self._moments()
        return {
            "master": self.master_WKD.detach(),
            "exp_avg": state["exp_avg"],
            "exp_avg_sq": state["exp_avg_sq"],
        }

    @property
    def updates(self) -> int:
        """AdamW's own count of updates."""
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
