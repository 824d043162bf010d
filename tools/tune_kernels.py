"""Times tile sizes of the GPU kernels on this GPU and writes the fastest into the kernels' table.

    python tools/tune_kernels.py
    python tools/tune_kernels.py blocks=8 kernel=mix_forward tokens=32768 write=false

Tokens are distributed as in text; values are bf16. The candidates take turns, and each result is compared with the
first one's. The output shows the median, the least bytes the kernel must move, and the resulting bandwidth. The
entries of this architecture for these K and D in tide_mega/kernels/tuning.json are replaced and record what was
timed. Without a CUDA device it says so and exits with status 3.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tide_mega.config.command_line import tool_entry
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.errors import ConfigError, refuse
from tide_mega.kernels.token_order import TokenOrder
from tide_mega.kernels.tuning import KERNELS, TABLE, Entry, Tile, arch_of, load, save
from tide_mega.lab.bench.measure import Spread, Stopwatch, take_turns
from tide_mega.lab.bench.mix import mix_floor_bytes
from tide_mega.lab.bench.text import draw_ids

NO_DEVICE = 3
CANDIDATES = {
    "mix_forward": [
        Tile(items, width, warps, 1)
        for items in (2, 4, 8, 16, 32)
        for width, warps in ((256, 4), (256, 8), (512, 4), (512, 8), (1024, 8))
    ],
    "mix_backward": [
        Tile(items, width, warps, 1)
        for items in (2, 4, 8, 16)
        for width in (64, 128, 256)
        for warps in (4, 8)
        if items * width <= 2048
    ],
    "row_gradient": [
        Tile(pairs, width, warps, stages)
        for pairs in (16, 32, 64)
        for width in (64, 128, 256)
        for warps in (4, 8)
        for stages in (3, 5, 6, 7)
    ],
    "row_slots": [Tile(1, width, 4, 1) for width in (512, 1024, 2048)],
    "norm_forward": [Tile(1, 1, warps, 1) for warps in (2, 4, 8, 16)],
    "norm_backward": [Tile(1, 1, warps, 1) for warps in (2, 4, 8, 16)],
    "norm_router_forward": [
        Tile(items, width, warps, stages)
        for items in (16, 32)
        for width in (64, 128, 256)
        for warps in (4, 8)
        for stages in (1, 3)
    ],
    "norm_router_backward": [Tile(items, 1, warps, 1) for items in (1, 2, 4, 8) for warps in (4, 8, 16)],
    "router_gradient": [
        Tile(items, width, warps, stages)
        for items in (32, 64, 128)
        for width in (64, 128, 256)
        for warps in (4, 8)
        for stages in (3, 4, 5)
    ],
}


@dataclass
class TuneOptions:
    """Options of `tools/tune_kernels.py`; lists may be given as a,b,c."""

    kernel: list[str] = field(default_factory=lambda: list(KERNELS))
    blocks: list[int] = field(default_factory=lambda: [2, 4, 8, 16, 24])
    """K."""
    tokens: int = 16_384
    """Of a microbatch."""
    vocab: int = 128_256
    """Types that the tokens are drawn from."""
    width: int = 2048
    """D."""
    layers: int = 24
    """Layers whose gradients are summed at once."""
    repeats: int = 20
    write: bool = True
    """Whether the table is rewritten."""
    table: str = str(TABLE)
    """The table to rewrite."""


@dataclass(frozen=True)
class Case:
    """A kernel ready to run with any tile; it returns its result."""

    run: Callable[[Tile], torch.Tensor]
    bytes: int
    """Least bytes it must read and write."""


def cases_of(options: TuneOptions, blocks: int, device: torch.device) -> dict[str, Case]:
    """Prepare random inputs of every kernel on the device."""
    # Imported here so that --help needs no triton.
    from tide_mega.kernels.mix.triton import mix_backward, mix_forward
    from tide_mega.kernels.norm_router.router_gradient import router_gradient
    from tide_mega.kernels.norm_router.triton import norm_router_backward, norm_router_forward
    from tide_mega.kernels.row_gradient.triton import add_rows
    from tide_mega.kernels.row_norm.triton import norm_backward, norm_forward

    types, index_N = draw_ids("zipf", options.tokens, options.vocab, seed=0).unique(return_inverse=True)
    N, U, K, D, L = options.tokens, types.numel(), blocks, options.width, options.layers
    order = TokenOrder.sort(index_N.to(device), U)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    logits_NJ, residual_ND, ffn_ND = draw(N, K + 1), draw(N, D), draw(N, D)
    rows_UKD, gains_KD, router_JD, gain_D = draw(U, K, D), draw(K, D), draw(K + 1, D), draw(D)
    gradients_ND = [draw(N, D) for _ in range(L)]
    alphas_NJ = [draw(N, K + 1).float().softmax(-1) for _ in range(L)]
    total_UKD = torch.zeros(U, K, D, device=device)
    *_, scale_N = norm_router_forward(residual_ND, gain_D, router_JD, 1e-5)

    def sum_rows(tile: Tile | None, slots_tile: Tile | None) -> torch.Tensor:
        add_rows(total_UKD.zero_(), order, alphas_NJ, gradients_ND, tile, slots_tile)
        return total_UKD

    one = mix_floor_bytes(tokens=N, width=D, blocks=K, rows=U, layers=1, element=2)
    # In addition to the floor: here the total is zeroed, then read and written.
    summed = mix_floor_bytes(tokens=N, width=D, blocks=K, rows=U, layers=L, element=2)["row gradient"]
    summed += 2 * total_UKD.nbytes
    return {
        "mix_forward": Case(
            lambda tile: mix_forward(logits_NJ, residual_ND, ffn_ND, rows_UKD, order, tile)[0],
            one["forward"],
        ),
        "mix_backward": Case(
            lambda tile: mix_backward(alphas_NJ[0], residual_ND, rows_UKD, order, torch.bfloat16, tile),
            one["backward"],
        ),
        "row_gradient": Case(lambda tile: sum_rows(tile, None), summed),
        "row_slots": Case(lambda tile: sum_rows(None, tile), summed),
        "norm_forward": Case(lambda tile: norm_forward(rows_UKD, gains_KD, 1e-5, tile), 2 * rows_UKD.nbytes),
        "norm_backward": Case(
            lambda tile: norm_backward(rows_UKD, gains_KD, rows_UKD, 1e-5, tile)[0], 3 * rows_UKD.nbytes
        ),
        "norm_router_forward": Case(
            lambda tile: norm_router_forward(residual_ND, gain_D, router_JD, 1e-5, tile)[1],
            2 * residual_ND.nbytes + logits_NJ.nbytes,
        ),
        "norm_router_backward": Case(
            lambda tile: norm_router_backward(
                residual_ND, gain_D, router_JD, scale_N, ffn_ND, logits_NJ, tile
            )[0],
            3 * residual_ND.nbytes + logits_NJ.nbytes,
        ),
        "router_gradient": Case(
            lambda tile: router_gradient(residual_ND, logits_NJ, tile), residual_ND.nbytes + logits_NJ.nbytes
        ),
    }


def fastest(kernel: str, case: Case, repeats: int, device: torch.device) -> tuple[Tile, Spread]:
    """Time every candidate and return the best with its seconds.

    Raises:
        RuntimeError: no candidate ran, or two gave different results.
    """
    expected: torch.Tensor | None = None
    actions: dict[str, Callable[[Stopwatch], None]] = {}
    tiles = {str(tile): tile for tile in CANDIDATES[kernel]}
    for name, tile in tiles.items():
        try:
            result = case.run(tile).float()
        except (
            Exception
        ) as error:  # too large for the device: triton raises a different class for each reason
            print(f"  {tile} does not run: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        expected = result.clone() if expected is None else expected
        if not torch.allclose(result, expected, rtol=2e-2, atol=2e-2):
            raise RuntimeError(
                f"{kernel} with {tile} gives another result than with the first tile that ran."
            )
        actions[name] = _action(case, tile)
    if not actions:
        raise RuntimeError(f"{kernel}: no candidate ran on this device.")
    turns = take_turns(actions, repeats, device, warmup=2, host_ahead=True)
    spreads = {name: Spread.of(found["total"]) for name, found in turns.items()}
    best = min(spreads, key=lambda name: spreads[name].median)
    return tiles[best], spreads[best]


def _action(case: Case, tile: Tile) -> Callable[[Stopwatch], None]:
    def action(watch: Stopwatch) -> None:
        case.run(tile)
        watch.mark("kernel")

    return action


def replace(entries: list[Entry], found: list[Entry]) -> list[Entry]:
    """Return the table with each found entry replacing the one with equal bounds, or appended."""

    def key(entry: Entry) -> tuple[str, str, int, int]:
        return entry.kernel, entry.arch, entry.most_blocks, entry.most_width

    new = {key(entry) for entry in found}
    return [entry for entry in entries if key(entry) not in new] + found


def _validate(options: TuneOptions) -> None:
    for name in options.kernel:
        if name not in KERNELS:
            refuse("kernel", name, "is unknown", f"use {', '.join(KERNELS)}")
    for key in ("tokens", "vocab", "width", "layers", "repeats"):
        if getattr(options, key) < 1:
            refuse(key, getattr(options, key), "is too small", "give 1 or more")
    if any(k < 1 for k in options.blocks):
        refuse("blocks", options.blocks, "has a K below 1", "give 1 or more")
    if not Path(options.table).is_file():
        refuse("table", options.table, "does not exist", "give the path of a table to rewrite")


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status: 0, 1 if a kernel fails, 2 for a bad option, 3 without a GPU."""
    options = parse_tool_cli(TuneOptions, argv, doc=__doc__ or "")
    try:
        _validate(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("No CUDA device here: kernels can be timed on a GPU alone.", file=sys.stderr)
        return NO_DEVICE
    device = torch.device("cuda", torch.cuda.current_device())
    how = f"timed: N={options.tokens} L={options.layers}, {torch.cuda.get_device_name(device)}"
    found = []
    for blocks in options.blocks:
        cases = cases_of(options, blocks, device)
        for kernel in options.kernel:
            try:
                tile, took = fastest(kernel, cases[kernel], options.repeats, device)
            except RuntimeError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
            least, spread = cases[kernel].bytes, (took.high - took.low) / 2
            print(
                f"{kernel} K={blocks}: {1e3 * took.median:.3f} ± {1e3 * spread:.3f} ms, at least "
                f"{least / 1e6:,.0f} MB, {least / took.median / 1e12:.2f} TB/s, {tile}",
                flush=True,
            )
            found.append(Entry(kernel, arch_of(device), blocks, options.width, tile, how))
    if options.write:
        save(replace(load(Path(options.table)), found), Path(options.table))
        print(f"wrote {len(found)} entries to {options.table}")
    return 0


if __name__ == "__main__":
    tool_entry(main)
