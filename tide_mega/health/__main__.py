"""Health check of every node that is about to train, with one process for each of the training's.

    python -m tide_mega.health [the training's overrides]

Compares GPUs, versions, code, clocks and free space of the nodes, checks that every node sees what the others
write to run.root, and all-reduces known numbers within each node, between neighbours and over all ranks. Nodes
whose sums are wrong, that hang, or that are slower than cluster.min_node_gbs and cluster.min_network_gbs are
named. Prints a table and what is wrong, and exits with status 5 if a node should not take part; the job scripts
of slurm/ run it before training.
"""

from tide_mega.config.command_line import hush_libraries
from tide_mega.config.hydra_door import hydra_entry
from tide_mega.config.schema import TideConfig


def main(config: TideConfig) -> None:
    """Check, print, exit with a status."""
    hush_libraries()
    # Imported late, like the training.
    from tide_mega.errors import Exit
    from tide_mega.health.check import check
    from tide_mega.parallel.groups import World
    from tide_mega.run.console import leave_at_once

    if not check(config, World.from_environment()):
        leave_at_once(Exit.UNHEALTHY)  # a thread that hangs in a collective would keep it alive


if __name__ == "__main__":
    hydra_entry(main)
