"""Exports a run's checkpoint to a folder that transformers, and what builds on it, loads and serves.

    python -m tide_mega.export run=runs/tide_8e_1b out=hf
    python -m tide_mega.export run=runs/tide_8e_1b step=50000 out=hf tables=int4 memory=sidecar license=apache-2.0
    python -m tide_mega.export run=runs/base_1b out=hf-base dtype=fp32

Reads a checkpoint of any topology piece by piece, so a gigabyte of memory suffices for a model of any size. Writes
weights (safetensors), tokenizer, configuration, the model's code and a model card. K = 0 becomes a stock Llama
folder. An interrupted export leaves nothing that looks like a model; the same command starts over. Loading the
folder needs transformers (`pip install 'tide_mega[hf]'`) and nothing from this package.
"""

import logging
import signal
import sys

from tide_mega.config.command_line import hush_libraries, tool_entry
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.export.options import ExportOptions, choose

log = logging.getLogger("tide_mega.export")


def main(arguments: list[str] | None = None) -> int:
    """Run the export; return the exit status."""
    options = parse_tool_cli(ExportOptions, arguments, doc=__doc__ or "")
    choose(options)
    hush_libraries()
    # Imported late: `--help` and a wrong key should not wait for torch and megatron-core.
    from tide_mega.export.export import export
    from tide_mega.run.console import exit_on_run_error, set_up_logging

    set_up_logging()
    with exit_on_run_error():
        exported = export(options)
    log.info("%s: %.2f GB", exported.folder, exported.size / 1e9)
    return 0


if __name__ == "__main__":
    # A requested stop ends like an error: what was written is removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    tool_entry(main)
