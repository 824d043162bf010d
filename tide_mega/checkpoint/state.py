"""state.json of a checkpoint: how far the run is, and what it is, so that nothing else can continue from it."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tide_mega
from tide_mega.checkpoint.storage import FORMAT, STATE_FILE
from tide_mega.config.schema import TideConfig
from tide_mega.config.versions import package_versions
from tide_mega.errors import CheckpointError, ConfigError
from tide_mega.files import read_json

_SHAPES = (
    *(
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "vocab_size",
    ),
    "tie_embeddings",
)


@dataclass
class TrainingState:
    """What a run needs, besides weights and optimizer state, to continue as if it had never stopped."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Sequences consumed over all ranks, in the order of the data: the whole state of the loader."""
    loss_sum: float = 0.0
    """Sums since the last log line, so that the next line equals the uninterrupted run's."""
    z_loss_sum: float = 0.0
    window_tokens: int = 0
    wandb_run_id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """State of other parts of the run, as JSON values by key."""
    tokens: int = 0
    """Training tokens of the `step` steps, over all ranks; a rollback resets both."""
    consumed_tokens: int = 0
    """Training tokens read so far, including steps undone by a rollback; a branch includes its parent's."""
    batches: int = 0
    """The same in batches, one per step."""
    is_milestone: bool = False
    """Whether this checkpoint is kept forever (`checkpoint.keep_every`)."""

    def take(self, sequences: int, seq_length: int) -> None:
        """Count a step on `sequences` sequences of `seq_length` tokens."""
        tokens = sequences * seq_length
        self.step += 1
        self.samples += sequences
        self.tokens += tokens
        self.consumed_tokens += tokens
        self.batches += 1

    def go_back_to(self, saved: "TrainingState") -> None:
        """Return to the state `saved`, but keep the position in the data."""
        read = (self.samples, self.consumed_tokens, self.batches)
        vars(self).update(vars(saved))
        self.samples, self.consumed_tokens, self.batches = read

    def count_tokens(self, seq_length: int) -> "TrainingState":
        """Fill in counts that the first checkpoint version lacks: its runs had one batch size and one dataset."""
        if self.step and not self.tokens:
            self.tokens = self.consumed_tokens = self.samples * seq_length
            self.batches = self.step
        return self


@dataclass(frozen=True)
class Identity:
    """What a checkpoint was made from: all must match, except topology and versions, kept for the record."""

    model: dict[str, Any]
    """Sizes that the tensors depend on, including K."""
    data: str
    """Fingerprint of the token stream, so that `samples` means the same."""
    deciles: str
    """Checksum of the frequency deciles, so that the loss of each decile continues the same curve."""
    topology: dict[str, int]
    versions: dict[str, Any]

    @classmethod
    def of(cls, config: TideConfig, data: str, bin_of_type: bytes, world_size: int) -> "Identity":
        """Return the identity of a run."""
        parallel = config.parallel
        topology = {
            "processes": world_size,
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "virtual_pipeline": parallel.virtual_pipeline,
            "data": world_size // (parallel.tensor * parallel.pipeline),
            "zero_stage": parallel.zero_stage,
            "table_owners": parallel.tensor
            if config.memory.owners == "tensor"
            else world_size // parallel.pipeline,
        }
        return cls(
            model=model_sizes(config),
            data=data,
            deciles=deciles_checksum(bin_of_type),
            topology=topology,
            versions={"tide_mega": tide_mega.__version__, **package_versions()},
        )

    def check(self, saved: "Identity", path: Path) -> None:
        """Refuse to continue from a checkpoint with another identity.

        Raises:
            ConfigError: it has another model, or was trained on other data.
        """
        check_model(self.model, saved.model, path, "or choose another run.name")
        for what, was, now in (
            ("on other data", saved.data, self.data),
            ("with other frequency deciles", saved.deciles, self.deciles),
        ):
            if was != now:
                raise ConfigError(
                    f"{path} was saved while training {what} than data.path holds now: bring the data back to "
                    "what it was, or choose another run.name."
                )


def model_sizes(config: TideConfig) -> dict[str, Any]:
    """Return the sizes that the tensors of a model depend on, including K."""
    sizes = {key: getattr(config.model, key) for key in _SHAPES}
    return {**sizes, "memory.num_blocks": config.memory.num_blocks}


def check_model(now: dict[str, Any], saved: dict[str, Any], path: Path, otherwise: str) -> None:
    """Refuse a checkpoint with the tensors of another model; `otherwise` is the advice that ends the message.

    Raises:
        ConfigError: a size differs.
    """
    other = [
        f"{name}={saved.get(name)} (now {now.get(name)})"
        for name in sorted(now.keys() | saved.keys())
        if saved.get(name) != now.get(name)
    ]
    if other:
        raise ConfigError(
            f"{path} holds another model, with {', '.join(other)}: give these the values they had, {otherwise}."
        )


def deciles_checksum(bin_of_type: bytes) -> str:
    """Return the checksum of the decile of each type of the model's vocabulary, one byte each."""
    return hashlib.sha256(bin_of_type).hexdigest()


@dataclass(frozen=True)
class SavedState:
    """The content of state.json."""

    save_id: str
    progress: TrainingState
    updates: int
    """AdamW's update count."""
    identity: Identity
    format: int = FORMAT

    def dump(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "SavedState":
        """Read a checkpoint's state.

        Raises:
            CheckpointError: it is not a state of this version.
        """
        try:
            content = read_json(folder, STATE_FILE)
            progress = TrainingState(**content.pop("progress"))
            identity = Identity(**content.pop("identity"))
            return cls(progress=progress, identity=identity, **content)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{folder / STATE_FILE} cannot be read ({error})") from error
