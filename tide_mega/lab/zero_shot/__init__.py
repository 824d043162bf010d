"""Zero-shot evaluation of checkpoints with lm-evaluation-harness."""
