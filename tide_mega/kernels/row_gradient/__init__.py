"""The gradient of the rows that all layers of a stage read, summed in fp32.

A layer's backward pass leaves its router weights and the gradient of its output; nothing of size [N, K, D] or
[U, K, D] is touched per layer. Once all layers of a micro-batch have left theirs, one segmented sum over tokens
sorted by row adds them up: dM[u, k] = Σ over layers and tokens of row u of α[n, k] · dh[n]. The order of
summation is fixed, so the result has the same bits from run to run.

Dimensions: U rows read, K memory blocks, J = K + 1, N tokens, D width.
"""

from tide_mega.kernels.row_gradient.sink import RowGradient

__all__ = ["RowGradient"]
