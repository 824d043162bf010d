"""One process of the topology under test: its model and engine, and the names of its weights."""

import re

import torch
from torch import Tensor, nn

from tide_mega.config.schema import TideConfig
from tide_mega.model.stage import TideStage
from tide_mega.model.weights import local_tensors
from tide_mega.parallel.device import choose_device
from tide_mega.parallel.engine import Engine
from tide_mega.parallel.groups import ParallelGroups, make_groups
from tide_mega.parity.case import Case
from tide_mega.parity.deviation import TABLES
from tide_mega.training import setup

LAYER = re.compile(r"chunks\.(\d+)\.decoder\.layers\.(\d+)\.")
CHUNK = re.compile(r"^chunks\.\d+\.")
NAMES = {"memory.tables_WKD": TABLES}


def build_stage(case: Case, config: TideConfig) -> TideStage:
    """Build this process's part of the model, with its share of the initial weights; collective."""
    groups = make_groups(config.parallel, 1, config.memory.owners)
    return setup.build_stage(config, groups, choose_device(case.device, 0))


def build_engine(case: Case, config: TideConfig, stage: TideStage) -> Engine:
    """Put the stage under DeepSpeed, with the training run's own builder; collective."""
    return setup.build_engine(config, stage, choose_device(case.device, 0), case.accumulation)


def mean_loss(groups: ParallelGroups, loss_sum: Tensor, tokens: Tensor) -> float:
    """Return the mean cross entropy of the whole step; collective."""
    sums = torch.stack([loss_sum.double(), tokens.double()])
    torch.distributed.all_reduce(sums, group=groups.data)
    torch.distributed.all_reduce(sums, group=groups.pipeline)
    return float(sums[0] / sums[1])


def local_weights(stage: TideStage) -> dict[str, Tensor]:
    """Return every weight of this process: the stage's parameters, and rows owned outside it.

    Names count layers over the whole model, not from the stage's first.
    """
    layers = [[layer.layer_number - 1 for layer in chunk.decoder.layers] for chunk in stage.transformers]
    weights: dict[str, Tensor] = {}
    for name, parameter in stage.named_parameters():
        if here := LAYER.match(name):
            name = f"layers.{layers[int(here[1])][int(here[2])]}.{name[here.end() :]}"
        if parameter is not stage.absent_tables:
            weights[NAMES.get(name, CHUNK.sub("", name))] = parameter
    if stage.owned is not None:
        weights[TABLES] = stage.owned.master_WKD
    return weights


def expected_values(stage: TideStage, config: TideConfig, canonical: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut this process's share out of canonical tensors; by the names of `local_weights`.

    Raises:
        RuntimeError: a weight has no canonical counterpart, so it would not be compared.
    """
    weights = local_weights(stage)
    names = {id(weight): name for name, weight in weights.items()}
    pairs = local_tensors(stage, config.model, lambda name, first, last: canonical[name][first:last])
    expected = {names[id(weight)]: values.detach() for weight, values in pairs if id(weight) in names}
    if missing := weights.keys() - expected.keys():
        raise RuntimeError(f"nothing to compare {', '.join(sorted(missing))} with")
    return expected


def trained_weights(engine: Engine, case: Case) -> dict[str, Tensor]:
    """Return copies of what the optimizer left, by name; collective.

    In fp32 the weights that the next forward pass would use; in bf16 and under ZeRO-3 the fp32 master weights.
    """
    from_master = case.precision == "bf16" or case.zero_stage == 3
    return {
        name: engine.master_weight(weight).clone()
        if from_master and isinstance(weight, nn.Parameter)
        else weight.detach().clone()
        for name, weight in local_weights(engine.module).items()
    }
