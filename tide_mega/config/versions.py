"""Versions of the packages that results depend on."""

import importlib.metadata

_PACKAGES = (
    "torch",
    "megatron-core",
    "deepspeed",
    "hydra-core",
    "webdataset",
    "wandb",
    "tokenizers",
    "tiktoken",
    "numpy",
    "safetensors",
)


def package_versions() -> dict[str, str | None]:
    """Return versions by distribution; None for one that is not installed."""
    return {name: _version(name) for name in _PACKAGES}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
