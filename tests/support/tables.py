"""Small tables with one owner a row, filled from a known whole table.

Shapes: V vocabulary, W rows of an owner, K blocks, D width.
"""

import numpy as np
import torch

from tide_mega.config.schema import OptimConfig, ParallelConfig
from tide_mega.memory.exchange import Owners, Route
from tide_mega.memory.owned import Fetch, OwnedTables
from tide_mega.memory.plan import plan_rows
from tide_mega.memory.traffic import TrafficMeter
from tide_mega.parallel.groups import make_groups

BLOCKS, WIDTH = 2, 3
OPTIM = OptimConfig(weight_decay=0.1, eps=1e-6, table_lr_multiplier=3.0)


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def owned_tables(vocabulary, tensor, dtype=torch.float32, optim=OPTIM, kernel="cpu"):
    tables = OwnedTables(
        BLOCKS,
        vocabulary,
        WIDTH,
        dtype=dtype,
        device=torch.device("cpu"),
        optim=optim,
        groups=make_groups(ParallelConfig(tensor=tensor), 1, "tensor_data"),
        meter=TrafficMeter(),
        kernel=kernel,
    )
    own = drawn(vocabulary, BLOCKS, WIDTH, seed=1)[tables.group.rank() :: tables.group.size()]
    with torch.no_grad():
        tables.master_WKD[: len(own)] = own
    return tables


def fetch(tables, ids) -> Fetch:
    """Fetch distinct ids, given ascending."""
    plan = plan_rows([torch.tensor(ids, dtype=torch.int64)], tables.vocab_size, tables.owners)
    return tables.fetch(plan)


def planned_route(ids_U, group, meter) -> Route:
    """Plan the exchange of distinct ids, given ascending, every process of the group asking for its own."""
    alone = make_groups(ParallelConfig(), 1).tensor
    asked = plan_rows([ids_U], owners=Owners(group, alone)).asked
    return Route.plan(ids_U, group, asked, meter)


def whole_rows(shards, vocabulary):
    """Put shards by owner together again: id v is row v div n of owner v mod n."""
    members = len(shards)
    return np.stack([shards[v % members][v // members] for v in range(vocabulary)])
