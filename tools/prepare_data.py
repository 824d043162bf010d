"""Tokenise text into a dataset for training: shards, index, token counts and frequency deciles.

    python tools/prepare_data.py inputs=corpus/ out=data/corpus tokenizer=tokenizer.json
    python tools/prepare_data.py inputs=stdlib out=data/demo tokenizer=bpe:8192

Reads .txt (a document a file), .jsonl, .ndjson and .json (an object a line), each as it is or compressed (.gz,
.zst, .xz, .bz2), .parquet, and folders of them. Hidden files in folders are left out and counted; so are files
of other kinds. Interrupted, it goes on where it stopped when the same command is given again.
"""

import sys

from tide_mega.config.errors import ConfigError
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.config.pipe import tool_entry
from tide_mega.data.errors import DataError
from tide_mega.data.options import PrepareOptions
from tide_mega.data.prepare import prepare


def main(argv: list[str] | None = None) -> int:
    """Runs the tool; returns its exit status: 0, 1 for bad data or a disk that fails, 2 for a bad option, 7 where
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
