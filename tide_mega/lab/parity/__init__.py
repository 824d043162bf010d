"""Parity: any topology against the plain single-process reference, on the same weights and data."""
