"""`faults.inject`: faults brought about on purpose, to see a run survive them."""

from dataclasses import dataclass

from tide_mega.config.errors import refuse

KINDS = {
    "nan_loss": "the step's loss is NaN",
    "nan_grad": "a value of the step's reduced gradient is NaN",
    "spike": "the step's loss is ten times what it is",
    "slow": "the rank computes `seconds` (1 if not given) longer in this step and all later ones",
    "hang": "the rank never comes back; once in a run folder",
    "kill": "SIGKILL; once in a run folder",
    "bad_shard": "the run stops as on a shard that cannot be read",
    "disk_full": "the first checkpoint from this step on fails as on a full disk; once in a run folder",
}
"""Kind -> what happens."""


@dataclass(frozen=True)
class Injection:
    """One fault to come."""

    text: str
    kind: str
    step: int
    """The batch of training data it strikes, from 1: the optimizer step, where no rollback has passed data by."""
    rank: int | None
    """None strikes every rank."""
    seconds: float


def parse_injection(text: str) -> Injection:
    """Read `kind@step[:rank[:seconds]]`, such as nan_grad@7:1 or slow@10:1:0.5.

    Raises:
        ConfigError: an unknown kind, or a step, rank or seconds that is no number of its range.
    """
    kind, _, rest = text.partition("@")
    if kind not in KINDS:
        refuse("faults.inject", text, "is no known fault", f"use kind@step[:rank] of {', '.join(KINDS)}")
    step, *more = rest.split(":")
    try:
        parsed = Injection(
            text, kind, int(step), int(more[0]) if more else None, float(more[1]) if len(more) > 1 else 1.0
        )
    except ValueError:
        parsed = None
    if (
        parsed is None
        or len(more) > (2 if kind == "slow" else 1)
        or parsed.step < 1
        or (parsed.rank or 0) < 0
        or not 0 < parsed.seconds < float("inf")
    ):
        form = "slow@step[:rank[:seconds]]" if kind == "slow" else f"{kind}@step[:rank]"
        refuse("faults.inject", text, "cannot be read", f"write {form} with a step from 1 and a rank from 0")
    return parsed
