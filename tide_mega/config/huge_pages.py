"""Memory in pages of 2 MiB: weights that a decoder streams need a five-hundredth of the translations."""

import os


def use_huge_pages() -> None:
    """Let torch ask the system for huge pages for large CPU tensors; to be called before torch is imported.

    Torch's own switch, off by default. Linux follows where /sys/kernel/mm/transparent_hugepage/enabled is madvise
    or always. THP_MEM_ALLOC_ENABLE=0 in the environment keeps it off.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
