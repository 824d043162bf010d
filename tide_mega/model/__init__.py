"""The model: a plain-torch oracle, and TIDE built from megatron-core's parallel layers."""
