"""Cross entropy and z-loss of a vocabulary-parallel output layer, without the logits of all tokens."""

from tide_mega.kernels.vocab_loss.chunked import vocab_loss
from tide_mega.kernels.vocab_loss.scores import vocab_scores

__all__ = ["vocab_loss", "vocab_scores"]
