"""tide_mega: pretraining of TIDE transformers (arXiv 2605.06216) and of their LLaMA baseline."""

__version__ = "0.1.0"
