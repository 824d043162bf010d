"""The plain reference of a case: built from the same initial weights, trained on the same batches.

Shapes: B sequences, T tokens, K blocks, V vocabulary, D hidden size.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tide_mega.config.schema import OptimConfig, TideConfig
from tide_mega.data.loader import TokenBatch
from tide_mega.lab.parity.case import STEPS, Z_LOSS, Case, batches_of_step, configuration, learning_rate
from tide_mega.model.reference import ReferenceShape, ReferenceTide
from tide_mega.model.weights import InitialWeights
from tide_mega.parallel.device import DTYPES

TABLES_KVD = "memory.tables_KVD"


def reference_model(config: TideConfig, device: str = "cpu") -> ReferenceTide:
    """Build the reference with the initial weights that any topology of `config` starts from."""
    model, memory = config.model, config.memory
    reference = ReferenceTide(ReferenceShape.of(model, memory.num_blocks))
    initial = InitialWeights(model, memory, config.trainer.seed)
    with torch.no_grad():
        for name, parameter in canonical_parameters(reference).items():
            values = initial.rows(name, 0, parameter.size(0))
            # DeepSpeed makes the fp32 master weights from the model it has cast, so they start rounded; the
            # masters of exclusively owned rows are never cast.
            owned = name.startswith("memory.tables.") and memory.owners == "tensor_data"
            parameter.copy_(values if owned else values.to(DTYPES[config.trainer.precision]))
    return reference.to(device)


def canonical_parameters(reference: ReferenceTide) -> dict[str, Tensor]:
    """Return the parameters by the names of `tide_mega.model.weights`: tables and gains block by block."""
    return _canonical(reference, lambda parameter: parameter)


def canonical_gradients(reference: ReferenceTide) -> dict[str, Tensor]:
    """Return the gradients by the same names.

    Raises:
        RuntimeError: a parameter has none.
    """
    return _canonical(reference, _gradient)


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("the reference has no gradient yet: run its backward pass first")
    return parameter.grad


def _canonical(reference: ReferenceTide, value_of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for name, parameter in reference.named_parameters():
        value = value_of(parameter)
        if name == TABLES_KVD:
            named.update({f"memory.tables.{k}": table_VD for k, table_VD in enumerate(value)})
        elif name.startswith("memory.norms."):
            named[f"memory.gains.{name.split('.')[2]}"] = value
        else:
            named[name] = value
    return named


def reference_backward(reference: ReferenceTide, batches: list[TokenBatch]) -> float:
    """Accumulate the gradient of the mean loss over microbatches; return the mean cross entropy."""
    total = 0.0
    for batch in batches:
        output = reference(batch.tokens_BT, batch.labels_BT, Z_LOSS)
        (output.loss / len(batches)).backward()
        total += float(output.cross_entropy_BT.detach().mean()) / len(batches)
    return total


def reference_optimizer(reference: ReferenceTide, optim: OptimConfig) -> torch.optim.AdamW:
    """Return torch's AdamW with the paper's groups: no weight decay on gains, a separate rate for tables."""
    decayed, plain, tables = [], [], []
    for name, parameter in reference.named_parameters():
        if name == TABLES_KVD:
            tables.append(parameter)
        elif parameter.ndim == 1:
            plain.append(parameter)
        else:
            decayed.append(parameter)
    decay = optim.weight_decay
    groups = [
        {"params": decayed, "weight_decay": decay, "multiplier": 1.0},
        {"params": plain, "weight_decay": 0.0, "multiplier": 1.0},
        {"params": tables, "weight_decay": decay, "multiplier": optim.table_lr_multiplier},
    ]
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.lr, betas=betas, eps=optim.eps)


def reference_step(
    reference: ReferenceTide, optimizer: torch.optim.AdamW, config: TideConfig, step: int
) -> float:
    """Clip, update, clear the gradients; return the norm before clipping."""
    norm = float(torch.nn.utils.clip_grad_norm_(reference.parameters(), config.optim.clip_grad))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step) * group["multiplier"]
    optimizer.step()
    optimizer.zero_grad()
    return norm


def bf16_reference_parameters(case: Case) -> dict[str, Tensor]:
    """Return the plain reference's parameters after training in bf16 with fp32 master weights."""
    config = configuration(case)
    master = reference_model(config, case.device)
    optimizer = reference_optimizer(master, config.optim)
    for step in range(STEPS):
        low = copy.deepcopy(master).bfloat16()
        batches = batches_of_step(case, step)
        for batch in batches:
            (low(batch.tokens_BT, batch.labels_BT, Z_LOSS).loss / len(batches)).backward()
            for wide, narrow in zip(master.parameters(), low.parameters(), strict=True):
                assert narrow.grad is not None
                wide.grad = narrow.grad.float() + (0 if wide.grad is None else wide.grad)
                narrow.grad = None
        reference_step(master, optimizer, config, step)
    return {name: parameter.detach() for name, parameter in canonical_parameters(master).items()}
