"""The operations of the memory, one folder each; `naive.py` is the oracle for the faster versions."""
