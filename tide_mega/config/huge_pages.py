"""Huge pages of 2 MiB for CPU memory: weights that a decoder streams need a five-hundredth of the translations."""

import os


def use_huge_pages() -> None:
    """Make torch request huge pages for large CPU tensors; call before importing torch.

    Sets torch's own switch, which is off by default. Linux complies if
    /sys/kernel/mm/transparent_hugepage/enabled is madvise or always. THP_MEM_ALLOC_ENABLE=0 in the environment
    keeps it off.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
