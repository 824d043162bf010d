"""The main job on one machine: train the baseline and a TIDE model on real text and compare them by frequency.

    python -m tide_mega.demo [key=value ...]

Prepares the running Python's standard library as a dataset (once), trains `experiment=demo_base` and
`experiment=demo_tide` one after the other on the same tokens in the same order, and ends with the held-out loss
of each frequency decile as a table, a picture and JSON in runs/demo. Minutes on two CPU cores. Interrupted, the
same command continues. Overrides go to both trainings, for example `trainer.max_steps=200`; with `data.path` of
a dataset made by tools/prepare_data.py it trains on that.
"""

import subprocess
import sys
import time
from pathlib import Path

from tide_mega.config.hydra_door import compose
from tide_mega.config.noise import hush_libraries
from tide_mega.config.pipe import tool_entry
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
    """Make the demo's dataset, unless there is one where the configuration says."""
    from tide_mega.data.options import PrepareOptions
    from tide_mega.data.prepare import prepare

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
    """Compare the last evaluations; print the table and write it, the picture and the data."""
    from tide_mega.data.frequency import DecileTable
    from tide_mega.diagnostics.deciles.comparison import compare_runs

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
