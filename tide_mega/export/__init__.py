"""From a run's checkpoint to a folder that transformers loads: weights by Llama's names, tokenizer, code, card."""
