"""Which K share a round of measurements: all, or each with K = 0, or each alone; by what fits the GPU."""

import sys
from typing import Any

import torch

from tide_mega.bench.step_measure import compare, measure_together
from tide_mega.config.device_memory import state_bytes
from tide_mega.config.schema import TideConfig
from tide_mega.parallel.device import Device

STATE_SHARE = 0.8
"""Share of a GPU's memory for weights, gradients and optimizer state; the rest is for one K's activations."""


def fits(configs: list[TideConfig], room: int | None) -> bool:
    """Whether the state of all leaves room for a step of one; always without a limit."""
    return room is None or sum(state_bytes(config, 1) for config in configs) <= STATE_SHARE * room


def plan_rounds(configs: dict[int, TideConfig], room: int | None) -> tuple[list[list[int]], dict[int, str]]:
    """Return the K of each round, and why a K is left out.

    A round with several K compares within itself. Rounds of one K alone come between rounds of K = 0.
    """
    if fits(list(configs.values()), room):
        return [list(configs)], {}
    rounds: list[list[int]] = []
    left_out: dict[int, str] = {}
    for blocks, config in configs.items():
        if blocks and fits([configs[0], config], room):
            rounds.append([0, blocks])
        elif fits([config], room):
            rounds += [[blocks], [0]] if blocks else [[0]]
        else:
            assert room is not None
            left_out[blocks] = (
                f"its weights, gradients and optimizer state need {state_bytes(config, 1) / 1e9:.0f} GB of "
                f"the {STATE_SHARE * room / 1e9:.0f} GB there are for them"
            )
    return rounds, left_out


def measure_rounds(
    configs: dict[int, TideConfig], device: Device, room: int | None, bandwidth: float, **settings: Any
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Measure all K that fit; returns a line for each, by ascending K, and why others are left out.

    Args:
        configs: by K, 0 among them.
        device: where to run.
        room: bytes of the GPU's memory; None means no limit.
        bandwidth: bytes per second, for the floors.
        settings: further ones of `measure_together`.

    Raises:
        RuntimeError: not even K = 0 fits.
    """
    waiting, left_out = plan_rounds(configs, room)
    done: list[list[dict[str, Any]]] = []
    while waiting:
        members = waiting.pop(0)
        try:
            done.append(measure_together({k: configs[k] for k in members}, device, **settings))
        except torch.OutOfMemoryError:
            if members == [0]:
                raise RuntimeError("a step at K=0 runs out of memory: give a smaller micro_batch") from None
            if len(members) == 1:
                left_out[members[0]] = "a step runs out of memory: give a smaller micro_batch"
            else:
                print(f"K={members} run out of memory together: now one by one", file=sys.stderr)
                waiting = [[0], *([k] for k in members if k), [0], *waiting]
    for blocks, reason in left_out.items():
        print(f"K={blocks} is left out: {reason}", file=sys.stderr)
    return _compared(done, bandwidth), left_out


def _compared(rounds: list[list[dict[str, Any]]], bandwidth: float) -> list[dict[str, Any]]:
    """Compare each K with K = 0 of its own round, or with the mean of those before and after; one line each."""
    lines: dict[int, dict[str, Any]] = {}
    bases = [next((line for line in found if line["blocks"] == 0), None) for found in rounds]
    for number, found in enumerate(rounds):
        base = bases[number]
        if base is None:
            before = next(line for line in reversed(bases[:number]) if line is not None)
            after = next((line for line in bases[number:] if line is not None), before)
            base = {**before, "seconds": _mean(before["seconds"], after["seconds"])}
        for line in compare(base, found, bandwidth):
            lines.setdefault(line["blocks"], line)
    return [lines[blocks] for blocks in sorted(lines)]


def _mean(a: dict[str, dict[str, float]], b: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {region: {key: (a[region][key] + b[region][key]) / 2 for key in a[region]} for region in a}
