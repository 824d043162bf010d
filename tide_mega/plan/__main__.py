"""Plan a training before it is paid for: does it fit, what does it move, how long does it take?

    python -m tide_mega.plan experiment=tide_8e_1b nodes=128
    python -m tide_mega.plan experiment=tide_24e_1b nodes=8 gpu=b200 parallel=tp2 out=plans/24e
    python -m tide_mega.plan experiment=tide_8e_3b nodes=32 parallel=tp8_pp4 network_gbs=25

The training's own code runs as the first and last tensor rank of every pipeline stage, one optimizer step each, on
tensors without numbers and a GPU that is not there: memory by kind and phase, every collective, every kernel are
counted and not guessed. The time of a step follows from them and from the assumptions printed at the end, each of
which can be given. No data is read: tokens are drawn as text is distributed.
"""

import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from tide_mega.config.command_line import hush_libraries, tool_entry
from tide_mega.config.hydra_door import compose, parse_tool_cli
from tide_mega.config.schema import TideConfig
from tide_mega.plan.options import PlanOptions, distinct_ranks, split_words

if TYPE_CHECKING:
    from tide_mega.plan.rank import RankStep

log = logging.getLogger("tide_mega.plan")

TIMEOUT = 3600.0
"""Seconds for one rank's dry run: a backstop, most take less than a minute."""
_UNSET = ("data.path=none",)
"""Given before the words of the training, which may give it again: a plan reads no data."""


def main(arguments: list[str]) -> int:
    """Plan, and print the result."""
    hush_libraries()
    mine, of_training = split_words(arguments)
    options = parse_tool_cli(PlanOptions, mine, doc=f"{__doc__}\n{PlanOptions.__doc__}")
    options.check()
    rates = options.rates()
    config = compose([*_UNSET, *of_training, "cluster.device=cuda"], world_size=options.world_size)
    # Imported late, so that a wrong key is reported without waiting for torch.
    from tide_mega.files import write_bytes, write_json
    from tide_mega.plan.estimate import estimate
    from tide_mega.plan.show import as_json, as_text, draw
    from tide_mega.run.console import exit_on_run_error, set_up_logging

    set_up_logging()
    with exit_on_run_error():
        ranks = options.ranks or distinct_ranks(config, options.world_size)
        steps = run_ranks(config, options.world_size, ranks, options.workers)
        found = estimate(config, options.world_size, steps, rates)
        text = as_text(config, options.world_size, steps, found, rates)
        print(text)
        if options.out is not None:
            out = Path(options.out)
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "plan.json", as_json(config, options.world_size, steps, found, rates))
            write_bytes(out / "plan.txt", f"{text}\n".encode())
            draw(steps, found, out / "plan.png")
            log.info("written to %s", out)
    return 0


def run_ranks(config: TideConfig, world_size: int, ranks: list[int], workers: int) -> list["RankStep"]:
    """Dry-run a step of each rank, a few at a time; return them in order.

    Raises:
        DryRunFailedError: a rank's step raised, died or took too long.
    """
    from tide_mega.dryrun.worker import DryWorker
    from tide_mega.plan.rank import run_rank

    idle: SimpleQueue[DryWorker] = SimpleQueue()
    processes = [DryWorker(timeout=TIMEOUT) for _ in range(min(workers, len(ranks)))]
    for process in processes:
        idle.put(process)

    def run(rank: int) -> "RankStep":
        worker = idle.get()
        try:
            log.info("rank %d of %d", rank, world_size)
            step: RankStep = worker.run(run_rank, config, world_size, rank)
            return step
        finally:
            idle.put(worker)

    try:
        with ThreadPoolExecutor(len(processes)) as pool:
            return list(pool.map(run, ranks))
    finally:
        for process in processes:
            process.close()


if __name__ == "__main__":
    tool_entry(lambda: main(sys.argv[1:]))
