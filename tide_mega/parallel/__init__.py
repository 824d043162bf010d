"""Processes, groups and devices; the only imports of DeepSpeed and of megatron-core's process state."""
