"""The plain reference with the weights of a checkpoint."""

import torch

from tide_mega.lab.parity.reference import canonical_parameters, reference_model
from tide_mega.model.reference import ReferenceTide
from tide_mega.trained.run import TrainedRun


@torch.no_grad()
def reference_of(run: TrainedRun) -> ReferenceTide:
    """Build it; every parameter comes from the checkpoint."""
    reference = reference_model(run.config)
    for name, parameter in canonical_parameters(reference).items():
        head, _, index = name.rpartition(".")
        if head == "memory.tables":
            values = run.weights.tensor(head)[:, int(index)]
        elif head == "memory.gains":
            values = run.weights.tensor(head)[int(index)]
        else:
            values = run.weights.tensor(name)
        parameter.copy_(values)
    return reference
