"""Checkpoints: written in the background, whole or absent, verified before use, readable at any topology."""

from tide_mega.checkpoint.saver import Checkpointer
from tide_mega.checkpoint.state import Identity, TrainingState
from tide_mega.errors import CheckpointError

__all__ = ["CheckpointError", "Checkpointer", "Identity", "TrainingState"]
