"""state.json: how far a run is, and what it is, so that nothing else can go on from its checkpoint."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tide_mega
from tide_mega.checkpoint.errors import CheckpointError
from tide_mega.checkpoint.manifest import FORMAT, STATE_FILE
from tide_mega.config.errors import ConfigError
from tide_mega.config.schema import TideConfig
from tide_mega.config.versions import package_versions

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
    """What a run must know, besides weights and optimizer, to go on as if it had never stopped."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Training sequences consumed over all ranks: the whole state of the loader."""
    loss_sum: float = 0.0
    """Sums since the last log line, so that the next line is the uninterrupted run's."""
    z_loss_sum: float = 0.0
    window_tokens: int = 0
    wandb_run_id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """What other parts of the run keep, JSON by name."""


@dataclass(frozen=True)
class Identity:
    """What a checkpoint was made of: all of it must fit but topology and versions, which are for the record."""

    model: dict[str, Any]
    """Sizes that the tensors depend on, K among them."""
    data: str
    """Fingerprint of the token stream, so that `samples` means the same."""
    deciles: str
    """Checksum of the frequency deciles, so that the loss of each goes on as the same curve."""
    topology: dict[str, int]
    versions: dict[str, Any]

    @classmethod
    def of(cls, config: TideConfig, data: str, bin_of_type: bytes, world_size: int) -> "Identity":
        """Describe a run."""
        model = {key: getattr(config.model, key) for key in _SHAPES}
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
            model={**model, "memory.num_blocks": config.memory.num_blocks},
            data=data,
            deciles=deciles_checksum(bin_of_type),
            topology=topology,
            versions={"tide_mega": tide_mega.__version__, **package_versions()},
        )

    def check(self, saved: "Identity", path: Path) -> None:
        """Refuse to go on from a checkpoint of another run.

        Raises:
            ConfigError: it has another model, or was trained on other data.
        """
        names = sorted(self.model.keys() | saved.model.keys())
        other = [
            f"{name}={saved.model.get(name)} (now {self.model.get(name)})"
            for name in names
            if saved.model.get(name) != self.model.get(name)
        ]
        if other:
            raise ConfigError(
                f"{path} holds another model, with {', '.join(other)}: give these the values they had, or choose "
                "another run.name."
            )
        for what, was, now in (
            ("on other data", saved.data, self.data),
            ("with other frequency deciles", saved.deciles, self.deciles),
        ):
            if was != now:
                raise ConfigError(
                    f"{path} was saved while training {what} than data.path holds now: bring the data (and the "
                    "shards that were skipped) back to what it was, or choose another run.name."
                )


def deciles_checksum(bin_of_type: bytes) -> str:
    """Identify frequency deciles by the decile of each type of the model's vocabulary, one byte each."""
    return hashlib.sha256(bin_of_type).hexdigest()


@dataclass(frozen=True)
class SavedState:
    """The content of state.json."""

    save_id: str
    progress: TrainingState
    updates: int
    """AdamW's count."""
    identity: Identity
    format: int = FORMAT

    def dump(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "SavedState":
        """Read a checkpoint's state.

        Raises:
            CheckpointError: it is not one of this version.
        """
        try:
            content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            progress = TrainingState(**content.pop("progress"))
            identity = Identity(**content.pop("identity"))
            return cls(progress=progress, identity=identity, **content)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{folder / STATE_FILE} cannot be read ({error})") from error
