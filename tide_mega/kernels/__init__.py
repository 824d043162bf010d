"""The operations of the memory, one folder each: `naive.py` is the oracle of its faster versions."""
