"""Reads requests from the command line, a file or standard input."""

import itertools
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tide_mega.data.prepare.compressed import read_line
from tide_mega.errors import ConfigError, refuse
from tide_mega.files import parse_json
from tide_mega.inference.options import GenerateOptions
from tide_mega.inference.sampling import Sampling
from tide_mega.inference.session import Request, RequestError

LONGEST_LINE = 2**24
_KINDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "max_tokens": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "seed": (int,),
    "stop": (list,),
}
"""Keys of a JSON request, and the types each accepts."""


def read_requests(options: GenerateOptions) -> Iterator[tuple[int, Request | RequestError]]:
    """Yield each request, or what is wrong with it, with its line number, as soon as the line arrives.

    Raises:
        ConfigError: an option has an invalid value, or the file of prompts cannot be opened.
    """
    request = request_of({"prompt": options.prompt or ""}, options, "prompt")
    return iter([(1, request)]) if options.prompt is not None else _read(_opened(options.prompts), options)


def _read(file: BinaryIO, options: GenerateOptions) -> Iterator[tuple[int, Request | RequestError]]:
    with file:
        for number in itertools.count(1):
            line, size = read_line(file, LONGEST_LINE)
            if not size:
                return
            name = f"line {number}"
            try:
                request = _request_of_line(line, options, name)
            except RequestError as error:
                yield number, error
            except ConfigError as error:
                yield number, RequestError(f"{name}: {error}")
            else:
                if request is not None:
                    yield number, request


def request_of(given: dict[str, Any], options: GenerateOptions, name: str) -> Request:
    """Build a request from its own values, with the options as defaults.

    Raises:
        ConfigError: a value out of range.
        RequestError: an unknown key, a value of a wrong type, or no prompt.
    """
    for key, value in given.items():
        if key not in _KINDS:
            raise RequestError(f"{name} has the key {key!r}: the keys are {', '.join(_KINDS)}.")
        if not isinstance(value, _KINDS[key]) or isinstance(value, bool):
            raise RequestError(f"{name} has a {key} that is no {_KINDS[key][-1].__name__}.")
    if "prompt" not in given:
        raise RequestError(f"{name} is a JSON object without a prompt.")
    values = {key: given.get(key, getattr(options, key)) for key in _KINDS}
    if values["max_tokens"] < 1:
        refuse("max_tokens", values["max_tokens"], "is too small", "use 1 or more")
    seed = secrets.randbits(48) if values["seed"] is None else values["seed"]
    if not 0 <= seed < 2**63:
        refuse("seed", seed, "is no seed", "use 0 to 2**63 - 1")
    if not all(isinstance(stop, str) and stop for stop in values["stop"]):
        raise RequestError(f"{name} has a stop that is no text, or empty.")
    sampling = Sampling(float(values["temperature"]), values["top_k"], float(values["top_p"]))
    return Request(values["prompt"], sampling, seed, values["max_tokens"], tuple(values["stop"]), name)


def _request_of_line(line: bytes | None, options: GenerateOptions, name: str) -> Request | None:
    """Return a line's request; None for a blank line."""
    if line is None:
        raise RequestError(f"{name} is longer than {LONGEST_LINE // 2**20} MiB.")
    try:
        text = line.decode("utf-8-sig" if name == "line 1" else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 at byte {error.start + 1}.") from None
    if not text.strip():
        return None
    if text.lstrip().startswith("{"):
        try:
            found = parse_json(text)
        except ValueError:
            found = None  # plain text that begins with a brace
        if isinstance(found, dict):
            return request_of(found, options, name)
    return request_of({"prompt": text}, options, name)


def _opened(path: str | None) -> BinaryIO:
    if path is None or path == "-":
        return sys.stdin.buffer
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise ConfigError(f"prompts={path} cannot be read: {error.strerror}.") from error
