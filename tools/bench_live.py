"""Cost of live diagnostics: training steps with and without them, in turns in one process.

    python tools/bench_live.py                                  # the demo's model, on this machine
    python tools/bench_live.py model=1b blocks=8 device=cuda micro_batch=8 out=live.json

Steps run through the trainer's own stage, engine and optimizer, on random ids distributed as in text. A round has
`every` steps of each kind, the last one logged; `ratio` compares the sums of a round. Each item is also timed by
itself within these steps; everything that a log line measures of loss, routers and tables counts as diagnostics.
Recording router weights is spread over the layers: its item is the time by which gradients take longer in the
median logged step than in the median other step, and 0 where noise hides it. With one process, no all-reduce is
timed. Shares are medians over the median step; half the interquartile range follows ±.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from tide_mega.config.command_line import tool_entry
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.errors import refuse
from tide_mega.lab.bench.step_case import StepChoice
from tide_mega.lab.bench.tool import run_tool


@dataclass
class LiveOptions(StepChoice):
    """Options of `tools/bench_live.py`."""

    blocks: int = 4
    """K."""
    rounds: int = 10
    every: int = 10
    """Steps of a round, one of them logged."""
    cadences: list[int] = field(default_factory=lambda: [10, 25])
    """Values of logging.every to give the amortised share for."""
    eval_every: int = 1000
    """Steps between evaluations, for that share."""
    warmup: int = 3
    wandb: bool = True
    """Whether records also go to an offline W&B run."""

    def validate(self) -> None:
        """Refuse invalid options.

        Raises:
            ConfigError: naming the option.
        """
        super().validate()
        self.at_least(1, "rounds", "every", "eval_every", "warmup")
        self.at_least(0, "blocks")
        if not self.cadences or min(self.cadences) < 1:
            refuse("cadences", self.cadences, "is not a list of numbers from 1", "give, say, 10,25")


def bench(options: LiveOptions) -> dict[str, Any]:
    """Measure; return what `out` receives.

    Raises:
        ConfigError: an option or override is wrong.
    """
    from tide_mega.lab.bench.live_case import LiveCase, measure
    from tide_mega.parallel.device import choose_device, set_threads
    from tide_mega.parallel.groups import World, start_distributed, stop_distributed

    device = choose_device(options.device, 0)
    threads = set_threads(options.threads, 1)
    fastest = "bf16" if device.has_fast_bf16() else "fp32"
    precision = fastest if options.precision == "auto" else options.precision
    config = options.configuration(options.model, options.blocks, precision)
    start_distributed(device, World(0, 1, 0, 1), 30.0, deterministic=config.trainer.deterministic)
    try:
        case = LiveCase(config, device, options.accumulation, wandb=options.wandb)
        try:
            cost = measure(case, rounds=options.rounds, every=options.every, warmup=options.warmup)
        finally:
            case.close()
    finally:
        stop_distributed()
    ran = {"precision": precision, "device": device.name, "threads": threads}
    ran |= {"seq_length": config.data.seq_length, "layers": config.model.num_layers}
    return {
        "options": {**asdict(options), **ran},
        **asdict(cost),
        "shares": {every: cost.share(every, options.eval_every) for every in options.cadences},
    }


def show(found: dict[str, Any]) -> str:
    """The result as text."""
    from tide_mega.lab.bench.live_case import EVALUATED, LOGGED
    from tide_mega.lab.bench.show import milliseconds
    from tide_mega.text_table import aligned

    options, step = found["options"], found["step"]["median"]

    def spread(of: dict[str, float]) -> str:
        return f"{milliseconds(of['median'])} ±{milliseconds((of['high'] - of['low']) / 2)}"

    rows = []
    for name, item in found["items"].items():
        every = options["eval_every"] if name in EVALUATED else options["every"] if name in LOGGED else 1
        when = {1: "every step"}.get(every, f"every {every:,} steps")
        share = item["median"] / step
        rows.append([name, spread(item), when, f"{share:.3%}", f"{share / every:.4%}"])
    ratio = found["ratio"]
    shares = ", ".join(f"{share:.3%} at logging.every={every}" for every, share in found["shares"].items())
    threads = f" with {options['threads']} threads" if options["device"] == "cpu" else ""
    return (
        f"Live diagnostics of {options['model']} with K={options['blocks']}, {options['accumulation']} x "
        f"{options['micro_batch'] * options['seq_length']:,} tokens of sequences of {options['seq_length']:,}, "
        f"{options['precision']}, on {options['device']}{threads}\n"
        f"{aligned([['item', 'ms', 'when', 'of a step', 'amortised']], rows)}\n"
        f"step without: {spread(found['step'])} ms; with / without in rounds of {options['every']}: "
        f"{ratio['median']:.4f} ({ratio['low']:.4f} to {ratio['high']:.4f})\n"
        f"all items, eval_every={options['eval_every']:,}: {shares}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status: 0, or 2 for a bad option."""
    options = parse_tool_cli(LiveOptions, argv, doc=__doc__ or "")

    def measure() -> dict[str, Any]:
        options.validate()
        return bench(options)

    return run_tool(measure, show, options.out)


if __name__ == "__main__":
    tool_entry(main)
