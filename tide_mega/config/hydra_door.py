"""The one door to Hydra and OmegaConf: from YAML groups and a command line to plain dataclasses.

A mistake of the user ends in one sentence on stderr and exit status 2, without a traceback.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tide_mega.config.describe import FieldHelp, describe, format_fields
from tide_mega.config.errors import ConfigError
from tide_mega.config.help_text import group_options, help_text
from tide_mega.config.messages import explain, refuse_nameless_options, unknown_key
from tide_mega.config.schema import TideConfig
from tide_mega.config.sweep_job import adopt_ranks
from tide_mega.config.validate import validate as check

T = TypeVar("T")
EXIT_CONFIG = 2
_NO_CONF = "No folder conf/ beside the package or in the current folder: start in a checkout of the project"
_HELP_FLAGS = ("--help", "-h")


def hydra_entry(run: Callable[[TideConfig], None]) -> None:
    """Run a training entry point: compose from `sys.argv`, convert, validate, call.

    Hydra's own flags work (`--help`, `--cfg job`, `--info`, `--multirun`, `--config-dir`). `WORLD_SIZE` in
    the environment, as torchrun and SLURM jobs set it, decides the rules that need the number of processes.
    A configuration error exits with status 2; only rank 0 prints what every rank finds alike.
    """

    def job(composed: DictConfig) -> None:
        # Inside the job, so that a sweep's other launchers get the same treatment.
        adopt_ranks()
        with _exit_on_config_error(every_rank=False):
            config = _to_dataclass(composed)
            check(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
        with _exit_on_config_error(every_rank=True):
            run(config)

    with _exit_on_config_error(every_rank=False):
        conf = find_conf()
        if conf is None and not any(word.startswith(("--config-dir", "-cd")) for word in sys.argv):
            raise ConfigError(f"{_NO_CONF} or give --config-dir=<folder>.")
        if conf is not None:
            refuse_nameless_options(sys.argv[1:], group_options(conf))
        _register(conf, with_help=any(flag in sys.argv for flag in _HELP_FLAGS))
    # Makes Hydra raise its own errors instead of printing several lines and exiting with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    conf_path = None if conf is None else str(conf)
    decorate = hydra.main(version_base=None, config_path=conf_path, config_name="config")
    with _exit_on_config_error(every_rank=False):
        decorate(job)()


def compose(overrides: list[str], *, validate: bool = True, world_size: int | None = None) -> TideConfig:
    """Compose the configuration as the command line would.

    Args:
        overrides: `group=option` and `key=value` words.
        validate: whether the rules of `tide_mega.config.validate` run on the result.
        world_size: processes of the run, for the rules that depend on it.

    Raises:
        ConfigError: a wrong key, type or option, or a rule broken.
    """
    conf = find_conf()
    if conf is None:
        raise ConfigError(f"{_NO_CONF}.")
    _register(conf, with_help=False)
    refuse_nameless_options(overrides, group_options(conf))
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with _translated(TideConfig), hydra.initialize_config_dir(version_base=None, config_dir=str(conf)):
            config = _to_dataclass(hydra.compose("config", overrides=overrides))
    finally:
        GlobalHydra.instance().hydra = outer
    if validate:
        check(config, world_size)
    return config


def to_yaml(config: TideConfig) -> str:
    """The whole configuration as YAML, every value resolved."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str) -> TideConfig:
    """Read what `to_yaml` wrote.

    Raises:
        ConfigError: a key or value that the schema does not have.
    """
    with _translated(TideConfig):
        return _to_dataclass(OmegaConf.merge(OmegaConf.structured(TideConfig), OmegaConf.create(text)))


def parse_tool_cli(schema: type[T], argv: list[str] | None = None, *, doc: str) -> T:
    """Read a tool's `key=value` arguments into its dataclass.

    A list may be written without brackets: `blocks=8,24`. `--help` prints `doc` and every field with type, default
    and the string under it. A wrong key or type, or a required field (default MISSING) left out, prints one
    sentence and exits with status 2.
    """
    words = sys.argv[1:] if argv is None else argv
    entries = describe(schema)
    if any(flag in words for flag in _HELP_FLAGS):
        print(f"{doc.strip()}\n\nArguments, as key=value:\n\n{format_fields(entries)}")
        raise SystemExit(0)
    with _exit_on_config_error(every_rank=True):
        given = [_read_word(word, entries) for word in words]
        with _translated(schema):
            merged = OmegaConf.merge(OmegaConf.structured(schema), *given)
            missing = sorted(OmegaConf.missing_keys(merged))
            if missing:
                raise ConfigError(f"{missing[0]} is not set: give {missing[0]}=<value>, or see --help.")
            return cast(T, OmegaConf.to_object(merged))


def _read_word(word: str, entries: list[FieldHelp]) -> DictConfig:
    if "=" not in word:
        raise ConfigError(f"{word!r} is not key=value: the keys are {', '.join(e.key for e in entries)}.")
    try:
        return OmegaConf.from_dotlist([_bracketed(word, entries)])
    except YAMLError as error:
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(f"{word} cannot be read: {problem}; quote special characters.") from error


def _bracketed(word: str, entries: list[FieldHelp]) -> str:
    key, _, value = word.partition("=")
    type_name = next((entry.type_name for entry in entries if entry.key == key), "")
    is_none = value == "null" and type_name.endswith("None")
    return f"{key}=[{value}]" if type_name.startswith("list[") and value[:1] != "[" and not is_none else word


def find_conf() -> Path | None:
    """The folder of configuration groups: beside the package (a source checkout), else in this folder."""
    for parent in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (parent / "conf" / "config.yaml").is_file():
            return parent / "conf"
    return None


def _register(conf: Path | None, *, with_help: bool) -> None:
    store = ConfigStore.instance()
    store.store(name="schema", node=TideConfig)
    template = help_text(group_options(conf), describe(TideConfig)) if with_help and conf is not None else ""
    node = {"app_name": "tide_mega", "header": "", "footer": "", "template": template}
    store.store(group="hydra/help", name="tide_mega", node=node)


def _to_dataclass(composed: Any) -> TideConfig:
    entries = describe(TideConfig)
    _refuse_unknown(OmegaConf.to_container(composed, resolve=False), entries)
    return cast(TideConfig, OmegaConf.to_object(composed))


def _refuse_unknown(content: Any, entries: list[FieldHelp]) -> None:
    # `+key=value` gets past the schema, and the value would then be ignored.
    known = {entry.key for entry in entries}
    for key in _leaf_keys(content):
        if key not in known:
            raise ConfigError(unknown_key(key, entries))


def _leaf_keys(node: Any, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaf_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@contextmanager
def _translated(schema: type) -> Iterator[None]:
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, describe(schema))) from error


@contextmanager
def _exit_on_config_error(*, every_rank: bool) -> Iterator[None]:
    try:
        with _translated(TideConfig):
            yield
    except ConfigError as error:
        _exit(str(error), every_rank=every_rank)


def _exit(sentence: str, *, every_rank: bool) -> NoReturn:
    if every_rank or os.environ.get("RANK", "0") == "0":
        print(sentence, file=sys.stderr, flush=True)
    raise SystemExit(EXIT_CONFIG)
