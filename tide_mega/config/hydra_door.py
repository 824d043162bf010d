"""The only user of Hydra and OmegaConf: from YAML groups and a command line to plain dataclasses.

A user's mistake ends in one sentence on stderr and exit status 2, without a traceback.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tide_mega.config.command_line import (
    quiet_when_unread,
    quote_texts,
    read_text,
    read_texts,
    single_keys,
    sort_words,
)
from tide_mega.config.help import FieldHelp, describe, format_fields, group_options, help_text, key_of, keyed
from tide_mega.config.messages import explain, refuse_keys_below, refuse_nameless_options, unknown_key
from tide_mega.config.schema import TideConfig
from tide_mega.config.sweep import adopt_ranks, sweep_log
from tide_mega.config.validate import validate as check
from tide_mega.errors import (
    ConfigError,
    Exit,
    StatedError,
    of_the_place,
    refuse,
    refuse_credentials,
    refuse_huge,
)
from tide_mega.files import check_folder_path, check_yaml

T = TypeVar("T")
_NO_CONF = "No folder conf/ beside the package or in the current folder: start in a checkout of the project"
_HELP_FLAGS = ("--help", "-h")


def hydra_entry(run: Callable[[TideConfig], None]) -> None:
    """Run a training entry point: compose from `sys.argv`, convert, validate, call.

    Hydra's own flags work before, between and after overrides (`--help`, `--cfg job`, `--info`, `--multirun`,
    `--config-dir`). `WORLD_SIZE` in the environment, set by torchrun and SLURM jobs, is used by the rules that
    need the number of processes. A configuration error exits with status 2; if every rank finds the same one,
    only rank 0 prints it. A sweep continues after a failed point, lists the failures at its end, and exits with
    status 8 if there are any.
    """
    log = sweep_log()

    def job(composed: DictConfig) -> None:
        # Inside the job, so that it also applies to a sweep's other launchers.
        adopt_ranks()
        at = HydraConfig.get()
        is_point = at.mode == RunMode.MULTIRUN
        with log.point(at.job.num, list(at.overrides.task)) if is_point else nullcontext():
            with _exit_on_config_error(every_rank=False):
                config = _to_dataclass(composed)
                check(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
            with _exit_on_config_error(every_rank=True):
                run(config)

    with _exit_on_config_error(every_rank=False):
        words = sort_words(sys.argv[1:])
        conf = find_conf()
        if conf is None and "--config-dir" not in words:
            raise ConfigError(f"{_NO_CONF} or give --config-dir=<folder>.")
        groups = {} if conf is None else group_options(conf)
        refuse_nameless_options(words, groups)
        sys.argv[1:] = _words_as_typed(words, groups)
        _register(conf, with_help="--help" in words)
    # Makes Hydra raise its own errors instead of printing several lines and exiting with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    conf_path = None if conf is None else str(conf)
    decorate = hydra.main(version_base=None, config_path=conf_path, config_name="config")
    with _exit_on_config_error(every_rank=False), quiet_when_unread():
        try:
            decorate(job)()
        except Exception:
            if not log.is_cut_short():
                raise
        except SystemExit:  # of a run; or of a sweep of several ranks, which no point follows
            log.end()
            raise
        if status := log.end():
            raise SystemExit(status)


def compose(overrides: list[str], *, validate: bool = True, world_size: int | None = None) -> TideConfig:
    """Compose the configuration as the command line would.

    Args:
        overrides: `group=option` and `key=value` words.
        validate: whether to check the result by the rules of `tide_mega.config.validate`.
        world_size: processes of the run, for the rules that depend on it.

    Raises:
        ConfigError: a key, type or option is wrong, or a rule is violated.
    """
    conf = find_conf()
    if conf is None:
        raise ConfigError(f"{_NO_CONF}.")
    _register(conf, with_help=False)
    groups = group_options(conf)
    refuse_nameless_options(overrides, groups)
    words = _words_as_typed(overrides, groups)
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with _translated(TideConfig), hydra.initialize_config_dir(version_base=None, config_dir=str(conf)):
            config = _to_dataclass(hydra.compose("config", overrides=words))
    finally:
        GlobalHydra.instance().hydra = outer
    if validate:
        check(config, world_size)
    return config


def to_yaml(config: TideConfig) -> str:
    """Return the whole configuration as YAML, with every value resolved."""
    return OmegaConf.to_yaml(_with_keys(OmegaConf.structured(config)))


def from_yaml(text: str) -> TideConfig:
    """Read what `to_yaml` wrote, which others may have changed: only plain values are accepted.

    Raises:
        ConfigError: a key or value does not fit the schema, or there is an interpolation, which could read
        anything in
            the reader's environment, an alias, or anything else that `check_yaml` refuses.
    """
    try:
        check_yaml(text)
        content = OmegaConf.create(text)
    except YAMLError as error:
        raise ConfigError(f"it is not YAML: {getattr(error, 'problem', None) or error}") from error
    except ValueError as error:  # e.g. a number of thousands of digits
        raise ConfigError(str(error)) from error
    _refuse_interpolations(OmegaConf.to_container(content, resolve=False))
    with _translated(TideConfig):
        return _to_dataclass(OmegaConf.merge(_with_keys(OmegaConf.structured(TideConfig)), content))


def parse_tool_cli(schema: type[T], argv: list[str] | None = None, *, doc: str) -> T:
    """Read a tool's `key=value` arguments into its dataclass.

    A list may be written without brackets: `blocks=8,24`. Text is taken as typed: `out=007`. `--help` prints
    `doc` and every field with type, default and docstring. A wrong key or type, a missing required field
    (default MISSING), or an `out` that is no valid folder name prints one sentence and exits with status 2.
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
            for entry in entries:
                refuse_huge(entry.key, OmegaConf.select(merged, entry.key))
            return cast(T, OmegaConf.to_object(merged))


def _read_word(word: str, entries: list[FieldHelp]) -> DictConfig:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"{word!r} is not key=value: the keys are {', '.join(e.key for e in entries)}.")
    types = {entry.key: entry.type_name for entry in entries}
    refuse_keys_below(key, types)
    refuse_credentials(key, value)
    type_name = types.get(key, "").removesuffix(" | None")
    read = OmegaConf.create({})
    if type_name == "str":
        text = read_text(value)
        if key == "out" and text is not None:
            check_folder_path(key, text)
        OmegaConf.update(read, key, text)
        return read
    if type_name == "list[str]":
        OmegaConf.update(read, key, read_texts(word))
        return read
    is_bare_list = type_name.startswith("list[") and value[:1] != "[" and value != "null"
    try:
        return OmegaConf.from_dotlist([f"{key}=[{value}]" if is_bare_list else word])
    except YAMLError as error:
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(f"{word} cannot be read: {problem}; quote special characters.") from error


def _words_as_typed(words: list[str], groups: Mapping[str, Any]) -> list[str]:
    """Quote values of text keys that Hydra's grammar would turn into numbers, booleans or errors."""
    types = {entry.key: entry.type_name for entry in describe(TideConfig)}
    for word in words:
        key, _, value = word.partition("=")
        refuse_keys_below(key, types)
        refuse_credentials(key, value)  # before Hydra stores a sweep's words
    types |= dict.fromkeys([*groups, "hydra.sweep.dir"], "str")
    types |= dict.fromkeys((key for word in words if "/" in (key := word.partition("=")[0])), "str")
    single = single_keys(words, {key.rpartition(".")[0] for key in types} - {""})
    return [quote_texts(word, types, _reads_as_typed, _in_quotes) for word in single]


def _reads_as_typed(text: str) -> bool:
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
        return bool(override.is_sweep_override() or override.value() == text)
    except HydraException:
        return False


def _in_quotes(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


def find_conf() -> Path | None:
    """Return the folder of configuration groups: beside the package (source checkout), else in this folder."""
    for parent in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (parent / "conf" / "config.yaml").is_file():
            return parent / "conf"
    return None


class SweepStart(Callback):
    """Hydra callback that tells the sweep log where the sweep's files lie."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Start the log."""
        sweep_log().begin(Path(config.hydra.sweep.dir))


def _register(conf: Path | None, *, with_help: bool) -> None:
    store = ConfigStore.instance()
    store.store(name="schema", node=_with_keys(OmegaConf.structured(TideConfig)))
    template = help_text(group_options(conf), describe(TideConfig)) if with_help and conf is not None else ""
    node = {"app_name": "tide_mega", "header": "", "footer": "", "template": template}
    store.store(group="hydra/help", name="tide_mega", node=node)
    callback = {"sweep_log": {"_target_": f"{SweepStart.__module__}.{SweepStart.__qualname__}"}}
    store.store(group="hydra/callbacks", name="tide_mega", node=callback)


def _to_dataclass(composed: Any) -> TideConfig:
    entries = describe(TideConfig)
    _refuse_unknown(OmegaConf.to_container(composed, resolve=False), entries)
    config = cast(TideConfig, OmegaConf.to_object(_with_fields(composed)))
    _refuse_interpolations(keyed(config))  # escaped ones, which could not be read back
    return config


def _with_keys(content: Any) -> Any:
    """Name the nodes of a structured configuration by their keys: `run.from` for the field `from_`."""
    return _renamed(content, lambda schema: {item.name: key_of(item.name) for item in fields(schema)})


def _with_fields(content: Any) -> Any:
    """Inverse of `_with_keys`."""
    return _renamed(content, lambda schema: {key_of(item.name): item.name for item in fields(schema)})


def _renamed(content: Any, names: Callable[[Any], dict[str, str]]) -> Any:
    if not isinstance(content, DictConfig):
        return content
    if is_dataclass(schema := OmegaConf.get_type(content)):
        with open_dict(content):
            for old, new in names(schema).items():
                if old != new and old in content:
                    node = content._get_node(old)  # with its type, which `content[old]` would lose
                    del content[old]
                    content[new] = node
    for name in content:
        _renamed(content._get_node(name), names)
    return content


def _refuse_unknown(content: Any, entries: list[FieldHelp]) -> None:
    # `+key=value` bypasses the schema, and its value would be ignored.
    known = {entry.key for entry in entries}
    for key, _ in _leaves(content):
        if key not in known:
            raise ConfigError(unknown_key(key, entries))


def _refuse_interpolations(content: Any) -> None:
    for key, value in _leaves(content):
        for text in value if isinstance(value, list) else [value]:
            if "${" in str(text):
                refuse(
                    key,
                    text,
                    "has ${, and stored configurations are plain values",
                    "write what it stands for",
                )


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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
    except (StatedError, OSError) as error:
        stated = of_the_place(error) if isinstance(error, OSError) else error
        if stated is None:
            raise
        _exit(str(stated), stated.exit_status, every_rank=every_rank)


def _exit(sentence: str, status: Exit, *, every_rank: bool) -> NoReturn:
    if every_rank or os.environ.get("RANK", "0") == "0":
        print(sentence, file=sys.stderr, flush=True)
    raise SystemExit(status)
