"""Kills a training at random instants, resumes it, and compares the final state with an undisturbed run's.

    python tools/kill_test.py --kills 50 --seed 1

Trains a small model (2 memory blocks whose rows are owned by tensor x data) in 2 processes on this machine's CPU,
with an asynchronous checkpoint every few steps, once undisturbed. Then it repeats the same training: both
processes get SIGKILL at an instant drawn from the seed, and the run is resumed in new processes, until `kills`
kills have been made. For every run that reaches its end, the SHA-256 of all tables, weights and moments of its
last checkpoint is compared with the undisturbed run's.

A third of the kills come at a time uniform over the life of the processes (start, resume, steps, saves), a third
as soon as a save has begun, a third as soon as a manifest appears. The table shows in which state each kill found
the folder. After each kill every checkpoint with a complete name must be whole.

Exit status: 0 all equal; 1 a difference, a damaged checkpoint with a complete name, or a run that failed; 2 wrong
arguments.
"""

import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tide_mega.config.command_line import tool_entry
from tide_mega.config.hydra_door import compose, parse_tool_cli
from tide_mega.config.schema import TideConfig
from tide_mega.errors import ConfigError, refuse
from tide_mega.lab.bench.killable import (
    MARK,
    PROCESSES,
    Training,
    damaged,
    digest,
    kill_when,
    saves_of,
    state_of,
)
from tide_mega.lab.bench.text import prepare_own_text

RUN = [
    *("experiment=demo_tide", "memory=k2", "memory.owners=tensor_data", "parallel.zero_stage=2"),
    *(
        "model.num_layers=2",
        "model.hidden_size=32",
        "model.ffn_hidden_size=64",
        "model.num_attention_heads=4",
    ),
    *("model.num_query_groups=2", "model.vocab_size=640", "data.seq_length=32", "data.num_workers=0"),
    *("trainer.precision=fp32", "trainer.global_batch_size=8", "trainer.micro_batch_size=2"),
    *("trainer.eval_every=0", "trainer.eval_sequences=4", "optim.warmup_steps=2", "logging.every=7"),
    *("logging.wandb=disabled", "cluster.threads=1", "cluster.peak_tflops=1", "cluster.device=cpu"),
]
KINDS = ("at any time", "in a save", "at the manifest")


@dataclass
class Options:
    """What to do."""

    kills: int = 50
    seed: int = 0
    steps: int = 40
    """Of each training."""
    every: int = 3
    """Steps between checkpoints."""
    keep: str | None = None
    """Folder to work in and leave; null uses one that is removed."""


def check(options: Options, folder: Path) -> int:
    """Make the kills and print the table; return the exit status."""
    data = prepare_own_text(folder, 600)
    chance = random.Random(options.seed)

    def config_of(name: str) -> TideConfig:
        words = [*RUN, f"data.path={data}", f"run.root={folder}", f"run.name={name}"]
        words += [f"trainer.max_steps={options.steps}", f"checkpoint.every={options.every}"]
        return compose(words, world_size=PROCESSES)

    def start(name: str) -> Training:
        return Training(config_of(name), folder / f"{name}.log")

    undisturbed = start("undisturbed")
    if not undisturbed.finish():
        print(f"the undisturbed training failed: see {folder / 'undisturbed.log'}", file=sys.stderr)
        return 1
    undisturbed = start("timed")  # the first one also waited for the fork server's imports
    if not undisturbed.finish():
        return 1
    life = undisturbed.seconds
    expected = digest(folder / "undisturbed" / "checkpoints")
    print(
        f"undisturbed: {options.steps} steps, {life:.1f} s, state {expected[:16]}; seed {options.seed}",
        flush=True,
    )
    print(f"{'kill':>4}  {'planned':<16}  {'after':>6}  {'found':<30}  {'newest':>6}  run", flush=True)
    found: Counter[str] = Counter()
    kills, wrong, equal, run, begin = 0, 0, 0, 0, time.monotonic()
    run_is_open = False
    while kills < options.kills or run_is_open:
        name = f"run-{run:03d}"
        checkpoints = folder / name / "checkpoints"
        kind, delay = chance.choice(KINDS), chance.uniform(0, life)
        training = start(name)
        if kills < options.kills and kill_when(training, kind, checkpoints, delay):
            kills += 1
            run_is_open = True
            state = state_of(checkpoints)
            found[state] += 1
            for partial in saves_of(checkpoints):
                (partial / MARK).touch()
            newest = max((int(p.name[5:13]) for p in checkpoints.glob("step-????????")), default=0)
            print(
                f"{kills:>4}  {kind:<16}  {training.seconds:>5.1f}s  {state:<30}  {newest:>6}  {name}",
                flush=True,
            )
            if problems := damaged(checkpoints):
                wrong += 1
                print(f"      DAMAGED {'; '.join(problems)}", flush=True)
            continue
        ended_well = training.finish()
        same = ended_well and digest(checkpoints) == expected
        equal += same
        wrong += not same
        verdict = "equal" if same else "DIFFERENT" if ended_well else f"FAILED, see {folder / name}.log"
        print(f"      {name} reached its end: {verdict}", flush=True)
        run, run_is_open = run + 1, False
    seconds = time.monotonic() - begin
    print("kills found: " + ", ".join(f"{count} {state}" for state, count in found.most_common()))
    print(
        f"{kills} kills in {run} runs, {equal} of {run} ended equal to the undisturbed one, {wrong} wrong; "
        f"{seconds:.0f} s, {seconds / max(kills, 1):.1f} s a kill"
    )
    return 1 if wrong or equal != run else 0


def read_arguments(words: list[str]) -> Options:
    """Accept `--kills 50` as well as `kills=50`.

    Raises:
        ConfigError: a number out of range.
        SystemExit: `--help`, or a wrong key or type.
    """
    joined: list[str] = []
    for word in words:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] = f"{joined[-1][2:]}={word}"
        else:
            joined.append(word)
    asks_help = any(word in ("--help", "-h") for word in words)
    options = parse_tool_cli(Options, ["--help"] if asks_help else joined, doc=__doc__ or "")
    for key in ("kills", "steps", "every"):
        if getattr(options, key) < 1:
            refuse(key, getattr(options, key), "is not positive", "give 1 or more")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", PYTHONWARNINGS="ignore")
    try:
        options = read_arguments(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if options.keep is not None:
        return check(options, Path(options.keep))
    with tempfile.TemporaryDirectory(prefix="tide-kill-") as folder:
        return check(options, Path(folder))


if __name__ == "__main__":
    tool_entry(main)
