"""Tile sizes of the GPU kernels by architecture, number of blocks and width, in a table kept beside this file.

`tools/tune_kernels.py` times candidates and rewrites the table; each entry says how it was chosen.

Dimensions: K memory blocks, D width.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_suffix(".json")
KERNELS = (
    *("mix_forward", "mix_backward", "row_gradient", "row_slots", "norm_forward", "norm_backward"),
    *("norm_router_forward", "norm_router_backward", "router_gradient"),
)
ANY = "any"
"""Architecture name of entries for architectures without their own, and for the interpreter."""


@dataclass(frozen=True)
class Tile:
    """The work of one program of a kernel.

    Programs that hold whole rows ignore `width`; the norms of memory rows process one at a time and ignore
    `items` too.
    """

    items: int
    """Tokens, or pairs of layer and token, per tile; a power of two."""
    width: int
    """Columns of D per tile; a power of two."""
    warps: int
    """Warps of 32 threads."""
    stages: int
    """Tiles in flight, for loops that feed the tensor cores."""


@dataclass(frozen=True)
class Entry:
    """The tile of a kernel for up to `most_blocks` K and `most_width` D on one architecture."""

    kernel: str
    arch: str
    most_blocks: int
    most_width: int
    tile: Tile
    chosen_by: str


def arch_of(device: torch.device) -> str:
    """Return the architecture of a CUDA device, such as `sm_90`; else `any`."""
    if device.type != "cuda":
        return ANY
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def tile_of(kernel: str, device: torch.device, blocks: int, width: int) -> Tile:
    """Return the tuning table's tile for K = `blocks` and D = `width` on this device."""
    return find(kernel, arch_of(device), blocks, width).tile


@cache
def find(kernel: str, arch: str, blocks: int, width: int) -> Entry:
    """Return the entry with the tightest bounds that include K and D; beyond all bounds, the widest.

    An architecture without entries of this kernel uses those of `any`.

    Raises:
        KeyError: the table has no entry for the kernel.
    """
    all_of_kernel = [entry for entry in load() if entry.kernel == kernel]
    entries = [e for e in all_of_kernel if e.arch == arch] or [e for e in all_of_kernel if e.arch == ANY]
    if not entries:
        raise KeyError(f"{TABLE.name} has no entry of kernel {kernel!r} for {arch} or {ANY}: add one.")
    holding = [e for e in entries if e.most_blocks >= blocks and e.most_width >= width]
    if holding:
        return min(holding, key=lambda e: (e.most_blocks, e.most_width))
    return max(
        entries, key=lambda e: (e.most_blocks >= blocks, e.most_width >= width, e.most_blocks, e.most_width)
    )


def load(path: Path = TABLE) -> list[Entry]:
    """Read a table.

    Raises:
        ValueError: an entry names an unknown kernel, or a tile size that is not a power of two.
    """
    entries = []
    for number, line in enumerate(json.loads(path.read_text(encoding="utf-8"))["entries"], start=1):
        tile = Tile(*(line.pop(key) for key in ("items", "width", "warps", "stages")))
        entry = Entry(tile=tile, **line)
        if entry.kernel not in KERNELS:
            raise ValueError(f"{path}: entry {number} is of {entry.kernel!r}, not of {', '.join(KERNELS)}.")
        if any(size < 1 or size & (size - 1) for size in (tile.items, tile.width, tile.warps)):
            raise ValueError(f"{path}: entry {number} has {tile}: items, width and warps are powers of two.")
        entries.append(entry)
    return entries


def save(entries: list[Entry], path: Path = TABLE) -> None:
    """Write a table, one entry per line."""
    lines = []
    for entry in sorted(
        entries, key=lambda e: (KERNELS.index(e.kernel), e.arch, e.most_blocks, e.most_width)
    ):
        values = asdict(entry)
        tile = values.pop("tile")
        lines.append("    " + json.dumps({**values, **tile}))
    text = '{\n  "entries": [\n' + ",\n".join(lines) + "\n  ]\n}\n"
    path.write_text(text, encoding="utf-8")
    find.cache_clear()
