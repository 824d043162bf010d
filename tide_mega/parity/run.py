"""Training a topology and the plain reference side by side, and measuring the difference.

Every function here runs in all processes of a case and returns what this process sees.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from tide_mega.model.bare_engine import BareEngine
from tide_mega.model.passes import compute_gradients, read_ahead
from tide_mega.model.reference import ReferenceTide
from tide_mega.parallel.engine import Engine
from tide_mega.parity.batches import batches_of_rank, batches_of_step
from tide_mega.parity.case import STEPS, Z_LOSS, Case, configuration, learning_rate
from tide_mega.parity.deviation import TABLES, Deviation, largest
from tide_mega.parity.reference import (
    bf16_reference_parameters,
    canonical_gradients,
    canonical_parameters,
    reference_backward,
    reference_model,
    reference_optimizer,
    reference_step,
)
from tide_mega.parity.topology import (
    build_engine,
    build_stage,
    expected_values,
    local_weights,
    mean_loss,
    trained_weights,
)


def compare(case: Case) -> Deviation:
    """Train five steps beside the reference: `compare_training`, or `compare_updates` for bf16."""
    return compare_updates(case) if case.precision == "bf16" else compare_training(case)


def compare_gradients(case: Case) -> Deviation:
    """One forward and backward, no optimizer: loss and the gradient of every weight.

    Data-parallel replicas all take the same batches, since nothing reduces their gradients here.
    """
    config = configuration(case)
    stage = build_stage(case, config)
    batches = batches_of_step(replace(case, data=1), 0)
    result = compute_gradients(cast(Engine, BareEngine(stage)), batches, Z_LOSS, window=case.window)
    reference = reference_model(config, case.device)
    expected_loss = reference_backward(reference, batches)
    gradients: dict[str, Any] = {name: weight.grad for name, weight in local_weights(stage).items()}
    if stage.owned is not None:
        gradients[TABLES] = stage.owned.gradient_WKD
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
    """Five AdamW steps with clipping active: loss and norm of each, all weights at the end."""
    trained = train_side_by_side(case)
    expected = expected_values(trained.engine.module, configuration(case), trained.reference)
    tensors = {name: relative(trained.weights[name], value) for name, value in expected.items()}
    trained.engine.close()
    return Deviation(trained.loss, trained.norm, tensors)


def compare_updates(case: Case) -> Deviation:
    """As `compare_training` for bf16: `tensors` are errors of the whole update, in the L2 norm.

    They are divided by the error that the plain reference makes when it computes in bf16: about 1 means
    that bf16 explains the difference.
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
    """The same after the last."""
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
