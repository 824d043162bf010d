"""Faults during training and how a run reacts: skip, roll back, name stragglers, stop, or exit to be restarted."""
