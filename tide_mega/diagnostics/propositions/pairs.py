"""How far apart token types are in the same context: as feed-forward layers see them, and in the memory.

Shapes: C contexts, N token types, B sequences, T tokens, P pairs, L layers, K blocks, J = K + 1, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tide_mega.diagnostics.propositions.routed_memory import normalised_rows
from tide_mega.trained.model import TrainedModel


@dataclass(frozen=True, eq=False)
class Seen:
    """What a model makes of types that each end the same context; fp32, on the CPU."""

    inputs_LND: Tensor
    """ñ, what the feed-forward layer gets."""
    outputs_LND: Tensor
    injected_LND: Tensor
    """m, what the memory adds beside it."""


@dataclass(frozen=True, eq=False)
class PairDistances:
    """l2 distances of pairs at one layer, mean over contexts; float64."""

    layer: int
    pairs_P2: np.ndarray
    """Places in the list of types."""
    inputs_P: np.ndarray
    outputs_P: np.ndarray
    injected_P: np.ndarray
    rows_PK: np.ndarray
    """Of the memory rows M_k, in which no context enters."""

    def only(self, chosen: np.ndarray) -> "PairDistances":
        """Return some of the pairs."""
        return PairDistances(
            self.layer,
            self.pairs_P2[chosen],
            self.inputs_P[chosen],
            self.outputs_P[chosen],
            self.injected_P[chosen],
            self.rows_PK[chosen],
        )


def look(model: TrainedModel, context_T: Tensor, ids_N: Tensor, batch: int) -> Seen:
    """Run every type after a context, `batch` of them at a time; look at the last position."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for ids in ids_N.split(batch):
        tokens_BT = torch.cat([context_T.expand(len(ids), -1), ids[:, None]], dim=1).to(
            model.device.torch_device
        )
        with _feed_forward(model) as watched:
            alpha_LBTJ = model.look_inside(tokens_BT).alpha_LBTJ
        if alpha_LBTJ is None:
            raise ValueError(f"{model.run.label} has no memory to look at")
        distinct_U, index_B = torch.unique(tokens_BT[:, -1], return_inverse=True)
        memory_BKD = normalised_rows(model, distinct_U)[index_B]
        injected_LBD = torch.einsum("lbk,bkd->lbd", alpha_LBTJ[:, :, -1, :-1].float(), memory_BKD)
        inputs, outputs = (torch.stack(side).float().cpu() for side in zip(*watched, strict=True))
        seen.append((inputs, outputs, injected_LBD.cpu()))
    return Seen(*(torch.cat(part, dim=1) for part in zip(*seen, strict=True)))


def closest_layer(seen: list[Seen]) -> int:
    """Return the layer whose feed-forward inputs lie closest: least median distance over median norm."""
    inputs_CLND = torch.stack([one.inputs_LND for one in seen]).double()
    L = inputs_CLND.size(1)
    upper = np.triu_indices(inputs_CLND.size(2), 1)
    relative = [
        float(_distances(inputs_CLND[:, i])[upper].median() / inputs_CLND[:, i].norm(dim=-1).median())
        for i in range(L)
    ]
    return relative.index(min(relative))


def measure(seen: list[Seen], rows_NKD: Tensor, layer: int) -> PairDistances:
    """Measure all pairs of types at a layer; `rows_NKD` are their normalised memory rows."""
    upper = np.triu_indices(rows_NKD.size(0), 1)

    def of(side: list[Tensor]) -> np.ndarray:
        return _distances(torch.stack(side).double())[upper].numpy()

    of_rows_K = [
        _distances(rows_NKD[None, :, k].double().cpu())[upper].numpy() for k in range(rows_NKD.size(1))
    ]
    return PairDistances(
        layer,
        np.stack(upper, axis=1),
        of([one.inputs_LND[layer] for one in seen]),
        of([one.outputs_LND[layer] for one in seen]),
        of([one.injected_LND[layer] for one in seen]),
        np.stack(of_rows_K, axis=1),
    )


def steepest(seen: list[Seen], layer: int) -> float:
    """Return the largest distance of outputs over that of inputs, of all pairs in each context by itself.

    Pairs whose inputs and outputs both coincide count as 0.
    """
    inputs_CNN, outputs_CNN = (
        _distances_of_each(torch.stack(side).double())
        for side in ([one.inputs_LND[layer] for one in seen], [one.outputs_LND[layer] for one in seen])
    )
    is_apart_CNN = (inputs_CNN != 0) | (outputs_CNN != 0)
    return float(torch.where(is_apart_CNN, outputs_CNN / inputs_CNN, 0.0).max())


def _distances(points_CND: Tensor) -> Tensor:
    """Distance [N, N] of every two points, mean over contexts."""
    return _distances_of_each(points_CND).mean(0)


def _distances_of_each(points_CND: Tensor) -> Tensor:
    """Distance [C, N, N] of every two points."""
    # Differences, not products: pairs that nearly coincide are what is looked for.
    return torch.cdist(points_CND, points_CND, compute_mode="donot_use_mm_for_euclid_dist")


@contextmanager
def _feed_forward(model: TrainedModel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within it, collect input and output [B, D] of every feed-forward layer at the last position."""
    watched: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> None:
        watched.append((arguments[0][-1], output[0][-1]))

    hooks = [layer.mlp.register_forward_hook(keep) for layer in model.stage.transformers[0].decoder.layers]
    try:
        yield watched
    finally:
        for hook in hooks:
            hook.remove()
