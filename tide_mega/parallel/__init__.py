"""Processes, groups, devices, and the doors to DeepSpeed and to megatron-core's process state."""
