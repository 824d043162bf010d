"""Checkpoints: written beside training, whole or absent, verified before use, readable at any topology."""

from tide_mega.checkpoint.checkpointer import Checkpointer
from tide_mega.checkpoint.errors import CheckpointError
from tide_mega.checkpoint.state import Identity, TrainingState

__all__ = ["CheckpointError", "Checkpointer", "Identity", "TrainingState"]
