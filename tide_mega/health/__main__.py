"""Check every node that is about to train, with a process for each of the training's.

    python -m tide_mega.health [the training's overrides]

Compares GPUs, versions, code, clocks and free space of the nodes, looks whether every node sees what the others
write into run.root, and adds up known numbers within each node, between neighbours and over all ranks: whoever
adds up wrongly, hangs, or is slower than cluster.min_node_gbs and cluster.min_network_gbs is named. Prints a table
and what is wrong, and exits with status 5 where a node should not take part; the job scripts of slurm/ run it
before the training.
"""

from tide_mega.config.hydra_door import hydra_entry
from tide_mega.config.noise import hush_libraries
from tide_mega.config.schema import TideConfig


def main(config: TideConfig) -> None:
    """Check, print, exit with a status."""
    hush_libraries()
    # Imported late, like the training.
    from tide_mega.config.exits import Exit
    from tide_mega.health.check import check
    from tide_mega.parallel.groups import World
    from tide_mega.training.console import leave_at_once

    if not check(config, World.from_environment()):
        leave_at_once(Exit.UNHEALTHY)  # a thread that hangs in a collective would keep it


if __name__ == "__main__":
    hydra_entry(main)
