"""The model: the plain-torch oracle, and TIDE built from megatron-core's parallel layers."""
