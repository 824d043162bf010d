"""Check every node that is about to train, with a process for each of the training's.

    python -m tide_mega.health [the training's overrides]

Compares GPUs, versions, code, clocks and free space of the nodes, adds up known numbers over all ranks, and
looks whether every node sees what the others write into run.root. Prints a table and what is wrong, and exits with
status 5 where a node should not take part; the job scripts of slurm/ run it before the training.
"""

import sys

from tide_mega.config.hydra_door import hydra_entry
from tide_mega.config.noise import hush_libraries
from tide_mega.config.schema import TideConfig


def main(config: TideConfig) -> None:
    """Check, print, exit with a status."""
    hush_libraries()
    # Imported late, like the training.
    from tide_mega.health.check import PATIENCE, check
    from tide_mega.parallel.groups import World
    from tide_mega.training.exits import Exit

    if not check(config, World.from_environment(), PATIENCE):
        sys.exit(Exit.UNHEALTHY)


if __name__ == "__main__":
    hydra_entry(main)
