"""The whole workflow on one machine: trains the baseline and a TIDE model, and compares them by frequency.

    python -m tide_mega.demo [key=value ...]

Prepares the running Python's standard library as a dataset (once), trains `experiment=demo_base` and
`experiment=demo_tide` one after the other on the same tokens in the same order, and ends with the held-out loss of
each frequency decile as a table, a picture and JSON in runs/demo. Takes minutes on two CPU cores. After an
interruption the same command continues. Overrides apply to both trainings, for example `trainer.max_steps=200`;
with `data.path` set to a dataset made by tools/prepare_data.py, it trains on that.
"""

import subprocess
import sys
import time
from pathlib import Path

from tide_mega.config.command_line import hush_libraries, tool_entry
from tide_mega.config.hydra_door import compose
from tide_mega.config.schema import TideConfig

LABELS = {"baseline": "demo_base", "TIDE": "demo_tide"}


def main(arguments: list[str]) -> int:
    """Run the demo with overrides for both trainings; return the exit status."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return 0
    started = time.monotonic()
    hush_libraries()
    configs = {
        label: compose([f"experiment={name}", *arguments], world_size=1) for label, name in LABELS.items()
    }
    prepare_text(configs["baseline"])
    for name in LABELS.values():
        command = [sys.executable, "-m", "tide_mega.train", f"experiment={name}", *arguments]
        print(f"\n$ python {' '.join(command[1:])}", flush=True)
        status = subprocess.run(command, check=False).returncode
        if status:
            print(f"{name} ended with status {status}: the same command continues it.", file=sys.stderr)
            return status
    report(configs)
    print(f"finished in {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


def prepare_text(config: TideConfig) -> None:
    """Prepare the demo's dataset, unless it exists at the configured path."""
    from tide_mega.data.prepare.options import PrepareOptions
    from tide_mega.data.prepare.pipeline import prepare

    if (Path(config.data.path) / "index.json").exists():
        return
    prepare(
        PrepareOptions(
            inputs=["stdlib"],
            out=config.data.path,
            tokenizer=f"bpe:{config.model.vocab_size}",
            validation_fraction=0.05,
        )
    )


def report(configs: dict[str, TideConfig]) -> None:
    """Compare the last evaluations; print the table, and write table, figure and data."""
    from tide_mega.data.frequency import DecileTable
    from tide_mega.lab.figures.decile_comparison import compare_runs

    first = next(iter(configs.values()))
    folders = {label: Path(config.run.root) / config.run.name for label, config in configs.items()}
    comparison = compare_runs(folders, DecileTable.load(first.data.path).count_ranges)
    folder = Path(first.run.root) / "demo"
    comparison.write(folder)
    print(
        f"\n{comparison.text()}\n\nwritten to {folder}: deciles.txt, deciles.png, deciles.json, deciles.csv\n"
        "every other figure of the paper: python -m tide_mega.analyze run="
        + ",".join(f"{label}={path}" for label, path in folders.items())
    )


if __name__ == "__main__":
    tool_entry(lambda: main(sys.argv[1:]))
