"""Diagnostics: the paper's figures and tables, from runs and checkpoints."""
