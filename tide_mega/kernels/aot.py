"""Ahead-of-time compilation of the GPU kernels without a GPU: registers, spills, shared memory, width of loads.

Dimensions: K memory blocks, D width.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tide_mega.kernels.mix import triton as mix
from tide_mega.kernels.norm_router import router_gradient
from tide_mega.kernels.norm_router import triton as norm_router
from tide_mega.kernels.row_gradient import triton as row_gradient
from tide_mega.kernels.row_norm import triton as row_norm
from tide_mega.kernels.tuning import Tile

POINTERS = {"bf16": "*bf16", "fp32": "*fp32"}
MOST_REGISTERS = 255
"""Of a thread."""
MOST_SINGLE_LOADS = 8
_REGISTERS, _WARPS, _PROGRAMS = 65_536, 64, 32
_SHARED, _SHARED_A_PROGRAM, _SHARED_RESERVED = 228 * 1024, 227 * 1024, 1024
_SIZES = ("N", "U", "C", "CHUNK", "J")


@dataclass(frozen=True)
class Report:
    """The resources that a compiled kernel needs of a multiprocessor."""

    kernel: str
    arch: str
    blocks: int
    width: int
    dtype: str
    warps: int
    registers: int
    """Per thread."""
    spill_bytes: int
    """Per thread, in local memory."""
    shared_bytes: int
    """Shared memory per program."""
    occupancy: float
    """Resident warps of a multiprocessor as a fraction of its maximum; from the figures above."""
    widest_load: int
    """Maximum bits that one instruction of one thread loads from global memory."""
    single_loads: int
    """Instructions that load a single 16-bit value; only router logits should be read this way."""

    @property
    def faults(self) -> list[str]:
        """Return what is wrong with the kernel, in words; empty if nothing is."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes a thread")
        if self.shared_bytes > _SHARED_A_PROGRAM:
            found.append(f"needs {self.shared_bytes} bytes of shared memory of {_SHARED_A_PROGRAM}")
        if self.registers > MOST_REGISTERS or self.occupancy == 0:
            found.append(f"fits on no multiprocessor with {self.registers} registers a thread")
        if self.width * 2 % row_gradient.ALIGNMENT == 0:
            if self.widest_load < 8 * row_gradient.ALIGNMENT:
                found.append(f"loads at most {self.widest_load} bits at a time")
            if self.single_loads > MOST_SINGLE_LOADS:
                found.append(f"loads 16 bits at a time in {self.single_loads} places")
        return found


def _mix_forward(K: int, D: int, tile: Tile) -> tuple[Any, dict[str, int]]:
    J_PAD = triton.next_power_of_2(K + 1)
    return mix.forward_kernel, {"D": D, "K": K, "J_PAD": J_PAD, "BN": tile.items, "BD": tile.width}


def _mix_backward(K: int, D: int, tile: Tile) -> tuple[Any, dict[str, int]]:
    K_PAD = triton.next_power_of_2(K)
    return mix.backward_kernel, {"D": D, "K": K, "K_PAD": K_PAD, "BN": tile.items, "BD": tile.width}


def _row_gradient(K: int, D: int, tile: Tile) -> tuple[Any, dict[str, int]]:
    K_PAD = max(16, triton.next_power_of_2(K))
    return row_gradient.pieces_kernel, {
        **{"D": D, "K": K, "K_PAD": K_PAD, "BE": tile.items, "BD": tile.width},
        **{"L": 24, "INTERPRETED": False},
    }


def _row_slots(K: int, D: int, tile: Tile) -> tuple[Any, dict[str, int]]:
    return row_gradient.slots_kernel, {"KD": K * D, "BX": tile.width}


def _norm_forward(K: int, D: int, tile: Tile) -> tuple[Any, dict[str, int]]:
    return row_norm.forward_kernel, {"D": D, "K": K, "D_PAD": triton.next_power_of_2(D)}


def _norm_backward(K: int, D: int, tile: Tile) -> tuple[Any, dict[str, int]]:
    return row_norm.backward_kernel, {"D": D, "K": K, "D_PAD": triton.next_power_of_2(D)}


def _norm_router_forward(K: int, D: int, tile: Tile) -> tuple[Any, dict[str, int]]:
    return norm_router.forward_kernel, {
        **{"D": D, "J": K + 1, "J_PAD": max(16, triton.next_power_of_2(K + 1))},
        **{"BN": tile.items, "BD": tile.width, "INTERPRETED": False},
    }


def _norm_router_backward(K: int, D: int, tile: Tile) -> tuple[Any, dict[str, int]]:
    return norm_router.backward_kernel, {"D": D, "D_PAD": triton.next_power_of_2(D), "BN": tile.items}


def _router_gradient(K: int, D: int, tile: Tile) -> tuple[Any, dict[str, int]]:
    return router_gradient.router_kernel, _norm_router_forward(K, D, tile)[1]


KERNELS: dict[str, Callable[[int, int, Tile], tuple[Any, dict[str, int]]]] = {
    "mix_forward": _mix_forward,
    "mix_backward": _mix_backward,
    "row_gradient": _row_gradient,
    "row_slots": _row_slots,
    "norm_forward": _norm_forward,
    "norm_backward": _norm_backward,
    "norm_router_forward": _norm_router_forward,
    "norm_router_backward": _norm_router_backward,
    "router_gradient": _router_gradient,
}
"""The kernel and its compile-time values, by name in the tuning table."""

_NOT_IN_DTYPE = {
    **dict.fromkeys(
        ("index_ptr", "sorted_ptr", "starts_ptr", "row_ptr", "first_ptr", "slot_ptr", "long_ptr"), "*i32"
    ),
    **dict.fromkeys(("gradients_ptr", "alphas_ptr"), "*i64"),
    **dict.fromkeys(("alpha_ptr", "total_ptr", "slots_ptr", "grad_gains_ptr"), "*fp32"),
    **dict.fromkeys(("scale_ptr", "gain_parts_ptr", "router_parts_ptr"), "*fp32"),
    "eps": "fp32",
}
"""Types of arguments that do not have the activations' dtype."""


def report(kernel: str, arch: str, blocks: int, width: int, dtype: str, tile: Tile) -> Report:
    """Compile one kernel as a launch with aligned tensors would, and return its resources.

    Args:
        kernel: a name of `KERNELS`.
        arch: sm_90 or sm_100.
        blocks: K.
        width: D.
        dtype: of activations, rows and gains: bf16 or fp32.
        tile: the tile sizes.
    """
    function, constants = KERNELS[kernel](blocks, width, tile)
    signature, attributes = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = _NOT_IN_DTYPE.get(name, "i32" if name in _SIZES else POINTERS[dtype])
        if name.endswith("_ptr"):
            attributes[(place,)] = [["tt.divisibility", row_gradient.ALIGNMENT]]
    source = ASTSource(function, signature, constants, attributes)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=target, options=options)
    registers, spill_bytes = _resources(compiled.asm["cubin"])
    shared, loads = compiled.metadata.shared, load_widths(compiled.asm["ptx"])
    return Report(
        kernel=kernel,
        arch=arch,
        blocks=blocks,
        width=width,
        dtype=dtype,
        warps=tile.warps,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=shared,
        occupancy=occupancy(registers, shared, tile.warps),
        widest_load=max(loads, default=0),
        single_loads=loads.count(16),
    )


def occupancy(registers: int, shared_bytes: int, warps: int) -> float:
    """Return the fraction of a multiprocessor's 64 warps that programs of `warps` warps fill.

    Both architectures have 64 Ki registers, allocated in units of 256 per warp, and 228 KiB of shared memory.
    """
    registers_of_a_warp = -(-registers * 32 // 256) * 256
    programs = min(_PROGRAMS, _WARPS // warps, _REGISTERS // max(1, registers_of_a_warp * warps))
    return min(programs, _SHARED // (shared_bytes + _SHARED_RESERVED)) * warps / _WARPS


def load_widths(ptx: str) -> list[int]:
    """Return the bits of every instruction that loads from global memory, including asynchronous copies."""
    loads = re.findall(r"ld\.global[.\w:]*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^,]*,[^,]*, *0x([0-9a-f]+)", ptx)
    return [int(count or 1) * int(bits) for count, bits in loads] + [8 * int(size, 16) for size in copies]


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers, and bytes of stack and local memory, per thread, from NVIDIA's cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not os.access(tool, os.X_OK):
        raise FileNotFoundError(f"{tool} is missing: triton's wheel for Linux has it.")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return figures["REG"], figures["STACK"] + figures["LOCAL"]
