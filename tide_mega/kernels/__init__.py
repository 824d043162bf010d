"""The operations of the memory, one folder each; `naive.py` is the oracle for the faster versions.

A new version is a file beside it, a branch in the folder's `__init__.py`, and its name in `choice.py`, in
`CHOICES` of `tide_mega.config.validate` and in the docstring of `KernelConfig`. `kernels.mix` also selects the
versions of `row_gradient` and `row_sum`.
"""
