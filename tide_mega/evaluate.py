"""Zero-shot evaluation of checkpoints with lm-evaluation-harness: the paper's Table 2.

    python -m tide_mega.evaluate run=runs/demo-k0,runs/demo-k4
    python -m tide_mega.evaluate run=runs/demo-k4 tasks=arc_easy,piqa local=<folder of JSONL files> limit=200
    torchrun --nproc-per-node=8 -m tide_mega.evaluate run=runs/tide_8e_1b tensor=2 precision=bf16

Prints a table with standard errors and chance, and writes zero_shot.json, .csv, .txt and .png to `out`. Tasks
whose data is unavailable are named and left out. Started again, it computes only what the JSON lacks. Needs `pip
install 'tide_mega[eval]'`.
"""

import logging
import os
import sys
from typing import Any

from tide_mega.config.command_line import hush_libraries, tool_entry
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.errors import Exit, StatedError, of_the_place, without_credentials
from tide_mega.lab.zero_shot.options import EvaluateOptions


def main(arguments: list[str] | None = None) -> int:
    """Run the evaluation; return the exit status."""
    options: Any = parse_tool_cli(EvaluateOptions, arguments, doc=__doc__ or "")
    hush_libraries()
    # Imported late: `--help` and a wrong key should not wait for torch and megatron-core.
    from tide_mega.lab.zero_shot.output import as_text
    from tide_mega.lab.zero_shot.session import evaluate
    from tide_mega.parallel.affinity import take_cores
    from tide_mega.parallel.device import choose_device
    from tide_mega.parallel.groups import World, start_distributed, stop_distributed
    from tide_mega.run.console import set_up_logging

    set_up_logging()
    world = World.from_environment()
    try:
        device = choose_device(options.device, world.local_rank)
        take_cores(device, options.threads, world)
        start_distributed(device, world, timeout_minutes=60)
        comparison = evaluate(options, device)
    except StatedError as error:
        return _end(world.size, error, error.exit_status)
    except Exception as error:
        if isinstance(error, OSError) and (stated := of_the_place(error)):
            return _end(world.size, stated, stated.exit_status)
        logging.getLogger(__name__).exception("the evaluation failed")
        return _end(world.size, error, Exit.ERROR)
    stop_distributed()
    if comparison is not None:
        print(f"\n{as_text(comparison)}", flush=True)
    return 0


def _end(processes: int, error: Exception, status: int) -> int:
    """Print why and end; with several processes immediately, since the others may wait for this one."""
    rank = os.environ.get("RANK", "0")
    sentence = without_credentials(str(error))
    print(f"rank {rank}: {sentence}" if processes > 1 else sentence, file=sys.stderr, flush=True)
    if processes > 1:
        sys.stdout.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    tool_entry(main)
