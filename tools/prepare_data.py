"""Tokenise text into a dataset for training: shards, index, token counts and frequency deciles.

    python tools/prepare_data.py inputs=corpus/ out=data/corpus tokenizer=tokenizer.json
    python tools/prepare_data.py inputs=stdlib out=data/demo tokenizer=bpe:8192

Reads .txt (a document a file), .jsonl, .jsonl.zst and .parquet, and folders of them. Interrupted, it goes
on where it stopped when the same command is given again.
"""

import sys

from tide_mega.config.errors import ConfigError
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.data.errors import DataError
from tide_mega.data.options import PrepareOptions
from tide_mega.data.prepare import prepare

_LISTS = ("inputs=", "suffixes=")


def main(argv: list[str] | None = None) -> int:
    """Runs the tool; returns its exit status: 0, 1 for bad data, 2 for a bad option."""
    words = sys.argv[1:] if argv is None else argv
    options = parse_tool_cli(PrepareOptions, [_as_list(word) for word in words], doc=__doc__ or "")
    try:
        prepare(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def _as_list(word: str) -> str:
    """Lets `inputs=a,b` stand for `inputs=[a,b]`."""
    for prefix in _LISTS:
        if word.startswith(prefix) and not word.startswith(f"{prefix}["):
            return f"{prefix}[{word.removeprefix(prefix)}]"
    return word


if __name__ == "__main__":
    sys.exit(main())
