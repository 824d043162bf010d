"""The training loss: cross entropy and z-loss of labelled tokens.

Shapes: B sequences, T tokens.
"""

from torch import Tensor


def token_loss(
    output_2BT: Tensor, labels_BT: Tensor, z_loss: float, share: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return mean(cross entropy) + z_loss · mean(log Z²) over labelled tokens, and its sums.

    Args:
        output_2BT: the model's per-token cross entropy and log-partition.
        labels_BT: ids, negative where there is nothing to predict.
        z_loss: weight of the second term (SPEC section 2: 1e-6).
        share: part of the step's microbatches that the running schedule averages over.

    Returns:
        The loss of this microbatch, and detached `cross_entropy` [B, T] (0 where unlabelled), `z_square`
        (scalar sum of log Z²) and `count` (labelled tokens).
    """
    cross_entropy_BT, log_partition_BT = output_2BT
    kept_BT = labels_BT >= 0
    cross_entropy_BT = cross_entropy_BT * kept_BT
    z_square = (log_partition_BT.square() * kept_BT).sum()
    count = kept_BT.sum()
    loss = share * (cross_entropy_BT.sum() + z_loss * z_square) / count
    return loss, {
        "cross_entropy": cross_entropy_BT.detach(),
        "z_square": z_square.detach(),
        "count": count,
    }
