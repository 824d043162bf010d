"""Router and mix by index: the operation each TIDE layer adds to the base transformer."""

from tide_mega.kernels.mix.naive import mix_by_index

__all__ = ["mix_by_index"]
