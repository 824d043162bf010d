"""Trains a TIDE model or its baseline: `python -m tide_mega.train experiment=tide_8e_1b [key=value ...]`.

Several processes on one machine: `torchrun --nproc-per-node=N -m tide_mega.train ...`; several machines:
`sbatch slurm/tide_1b.sh ...`. `--help` lists every group and key, `--cfg job` prints the resolved configuration.
"""

from tide_mega.config.command_line import hush_libraries
from tide_mega.config.hydra_door import hydra_entry
from tide_mega.config.schema import TideConfig


def main(config: TideConfig) -> None:
    """Train the run that the configuration describes."""
    hush_libraries()
    # Imported late: `--help` and a wrong key should not wait for torch, megatron-core and DeepSpeed.
    from tide_mega.run.console import exit_on_run_error, set_up_logging
    from tide_mega.training.trainer import train

    set_up_logging()
    with exit_on_run_error():
        train(config)


if __name__ == "__main__":
    hydra_entry(main)
