"""The way of a microbatch's token order to the layers: the one place that says how megatron-core carries it.

A decoder-only GPTModel hands `extra_block_kwargs` to its block, and the block hands `context` to every layer and
through activation recompute without using it: so from 0.16 to 0.19. From 0.19 on GPTModel is called deprecated in
favour of HybridModel, which takes no `extra_block_kwargs` and whose block passes no `context`: there the order has
to travel otherwise, a microbatch's own to its recompute too. Model and layers only call what is here.
"""

from typing import Any

from torch import Tensor


def for_model(packed: Tensor | None) -> dict[str, Any]:
    """Return the arguments of the model's forward pass that carry a packed TokenOrder."""
    return {"extra_block_kwargs": {"context": packed}}


def taken_by_layer(arguments: dict[str, Any]) -> Tensor | None:
    """Take the order out of a layer's keyword arguments."""
    return arguments.pop("context", None)


def left_by_layer(hidden: Tensor, packed: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return a layer's outputs, with the order for the layer that follows."""
    return hidden, packed
