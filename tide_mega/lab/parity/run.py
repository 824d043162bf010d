"""Trains a topology and the plain reference side by side and measures the difference.

Runs in each process of the topology: builds its part of the model and the engine, and names its weights.

Shapes: W rows of this process, K blocks, D hidden size.
"""

import re
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tide_mega.config.schema import TideConfig
from tide_mega.lab.parity.case import (
    STEPS,
    Z_LOSS,
    Case,
    batches_of_rank,
    batches_of_step,
    configuration,
    learning_rate,
)
from tide_mega.lab.parity.check import TABLES, Deviation, largest
from tide_mega.lab.parity.reference import (
    bf16_reference_parameters,
    canonical_gradients,
    canonical_parameters,
    reference_backward,
    reference_model,
    reference_optimizer,
    reference_step,
)
from tide_mega.model.reference import ReferenceTide
from tide_mega.model.stage import TideStage
from tide_mega.model.steps import BareEngine, compute_gradients, read_ahead
from tide_mega.model.weights import local_tensors
from tide_mega.parallel.device import choose_device
from tide_mega.parallel.engine import Engine
from tide_mega.parallel.groups import ParallelGroups, make_groups
from tide_mega.training import setup

LAYER = re.compile(r"chunks\.(\d+)\.decoder\.layers\.(\d+)\.")
CHUNK = re.compile(r"^chunks\.\d+\.")
NAMES = {"memory_blocks.tables_WKD": TABLES, "memory_blocks.gains_KD": "memory.gains_KD"}


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
    """Return every weight of this process: the stage's parameters, and the rows it owns besides.

    Names count layers over the whole model, not from the stage's first.
    """
    layers = [[layer.layer_number - 1 for layer in chunk.decoder.layers] for chunk in stage.transformers]
    weights: dict[str, Tensor] = {}
    for name, parameter in stage.named_parameters():
        if here := LAYER.match(name):
            name = f"layers.{layers[int(here[1])][int(here[2])]}.{name[here.end() :]}"
        if parameter is not stage.absent_tables:
            weights[NAMES.get(name, CHUNK.sub("", name))] = parameter
    if stage.memory.owned is not None:
        weights[TABLES] = stage.memory.owned.master_WKD
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
    """Return copies of the trained weights, by name; collective.

    In fp32 these are the weights of the next forward pass; in bf16 and under ZeRO-3 the fp32 master weights.
    """
    from_master = case.precision == "bf16" or case.zero_stage == 3
    return {
        name: engine.master_weight(weight).clone()
        if from_master and isinstance(weight, nn.Parameter)
        else weight.detach().clone()
        for name, weight in local_weights(engine.module).items()
    }


def compare(case: Case) -> Deviation:
    """Train five steps beside the reference: `compare_training`, or `compare_updates` for bf16."""
    return compare_updates(case) if case.precision == "bf16" else compare_training(case)


def compare_gradients(case: Case) -> Deviation:
    """Compare one forward and backward pass, without optimizer: loss and the gradient of every weight.

    Data-parallel replicas all take the same batches, since nothing reduces their gradients here.
    """
    config = configuration(case)
    stage = build_stage(case, config)
    batches = batches_of_step(replace(case, data=1), 0)
    result = compute_gradients(cast(Engine, BareEngine(stage)), batches, Z_LOSS, window=case.window)
    reference = reference_model(config, case.device)
    expected_loss = reference_backward(reference, batches)
    gradients: dict[str, Any] = {name: weight.grad for name, weight in local_weights(stage).items()}
    if stage.memory.owned is not None:
        gradients[TABLES] = stage.memory.owned.gradient_WKD
    missing = [name for name, gradient in gradients.items() if gradient is None]
    if missing:
        raise RuntimeError(f"the backward pass left no gradient on {', '.join(missing)}")
    expected = expected_values(stage, config, canonical_gradients(reference))
    loss = mean_loss(stage.groups, result.loss_sum, result.tokens)
    return Deviation(
        loss=abs(loss - expected_loss) / expected_loss,
        norm=0.0,
        tensors={name: relative(gradients[name], value) for name, value in expected.items()},
    )


def compare_training(case: Case) -> Deviation:
    """Compare five AdamW steps with clipping active: loss and norm of each, all weights at the end."""
    trained = train_side_by_side(case)
    expected = expected_values(trained.engine.module, configuration(case), trained.reference)
    tensors = {name: relative(trained.weights[name], value) for name, value in expected.items()}
    trained.engine.close()
    return Deviation(trained.loss, trained.norm, tensors)


def compare_updates(case: Case) -> Deviation:
    """Compare like `compare_training`, for bf16: `tensors` are errors of the whole update, in the L2 norm.

    They are divided by the error of the plain reference computing in bf16: about 1 means that bf16 explains the
    difference.
    """
    trained = train_side_by_side(case)
    stage, config = trained.engine.module, configuration(case)
    exact = expected_values(stage, config, trained.reference)
    rounded = expected_values(stage, config, bf16_reference_parameters(case))
    tensors = {}
    for name, expected in exact.items():
        error = float((trained.weights[name] - expected).norm())
        size = float((expected - trained.start[name]).norm())
        explained = float((rounded[name] - expected).norm()) + 0.005 * size
        tensors[name] = error / explained if error else 0.0
    trained.engine.close()
    return Deviation(trained.loss, trained.norm, tensors)


@dataclass
class Trained:
    """A topology and its reference after the same steps."""

    engine: Engine
    start: dict[str, Tensor]
    """This process's weights before the first step, by name."""
    weights: dict[str, Tensor]
    """The same after the last step."""
    reference: dict[str, Tensor]
    """The reference's parameters, by canonical name."""
    loss: float
    """Largest relative difference over the steps."""
    norm: float


def train_side_by_side(case: Case) -> Trained:
    """Train both for some clipped AdamW steps; collective.

    Raises:
        RuntimeError: the norm was not above the clipping threshold, so a wrong clip factor would not show.
    """
    config = configuration(case)
    engine = build_engine(case, config, build_stage(case, config))
    stage, groups = engine.module, engine.module.groups
    reference = reference_model(config, case.device)
    optimizer = reference_optimizer(reference, config.optim)
    start = trained_weights(engine, case)
    losses, norms, ahead = [], [], None
    for step in range(STEPS):
        own = batches_of_rank(case, groups.data_rank, step)
        result = compute_gradients(engine, own, Z_LOSS, window=case.window, ahead=ahead)
        engine.step(learning_rate(config, step))
        if case.exchange_ahead:
            ahead = read_ahead(stage, batches_of_rank(case, groups.data_rank, step + 1))
        loss = mean_loss(groups, result.loss_sum, result.tokens)
        expected_loss = reference_backward(reference, batches_of_step(case, step))
        expected_norm = reference_step(reference, optimizer, config, step)
        if expected_norm <= config.optim.clip_grad:
            raise RuntimeError(
                f"step {step} has a gradient norm of {expected_norm:g}, not above clip_grad="
                f"{config.optim.clip_grad}: clipping would not be tested"
            )
        losses.append(abs(loss - expected_loss) / expected_loss)
        norms.append(abs(engine.grad_norm() - expected_norm) / expected_norm)
    weights = trained_weights(engine, case)
    parameters = detached(reference)
    return Trained(engine, start, weights, parameters, largest(losses), largest(norms))


def detached(reference: ReferenceTide) -> dict[str, Tensor]:
    """Return the reference's parameters by canonical name, without their graph."""
    return {name: parameter.detach() for name, parameter in canonical_parameters(reference).items()}


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest magnitude; infinite where a value is NaN."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if actual.shape != expected.shape:
        raise ValueError(
            f"shapes differ: {tuple(actual.shape)} here, {tuple(expected.shape)} in the reference"
        )
    difference = (actual - expected).abs().max()
    return largest([float(difference / expected.abs().max().clamp_min(1e-30))])
