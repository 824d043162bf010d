"""Tokenises text into a dataset for training: shards, index, token counts and frequency deciles.

    python tools/prepare_data.py inputs=corpus/ out=data/corpus tokenizer=tokenizer.json
    python tools/prepare_data.py inputs=stdlib out=data/demo tokenizer=bpe:8192

Reads .txt (one document per file), .jsonl, .ndjson and .json (one object per line), each plain or compressed (.gz,
.zst, .xz, .bz2), .parquet, and folders of them. Hidden files in folders and files of other kinds are left out and
counted. After an interruption the same command continues where it stopped.
"""

import sys

from tide_mega.config.command_line import tool_entry
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.data.prepare.options import PrepareOptions
from tide_mega.data.prepare.pipeline import prepare
from tide_mega.errors import ConfigError, DataError


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status: 0, 1 for bad data or a disk that fails, 2 for a bad option, 7 where
    `out` is in use.
    """
    options = parse_tool_cli(PrepareOptions, argv, doc=__doc__ or "")
    try:
        prepare(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"error: {error}; put that right, and the same command continues", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    tool_entry(main)
