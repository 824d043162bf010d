"""Bytes per step of the memory's exchange, against dense data-parallel synchronisation, on real text.

    python tools/memory_plan.py
    python tools/memory_plan.py text=corpus/ tokenizer=tokenizer.json data=64 out=plan.json
    python tools/memory_plan.py text=data/corpus blocks=8

Counts the distinct token types U that a data-parallel rank reads in a step, then predicts, for each number of
blocks K, the bytes of a rank each way (mean of sent and received, on both sides) and the time on its link. `dense`
has the tables replicated over data parallelism (reduce-scatter of the gradients, all-gather of the weights);
`exchange` has each row owned by one rank, and once a step fetches distinct rows and returns their gradients. What
the exchange also moves among the tensor ranks and stages of one replica has its own column; what the other
approach moves there is not counted. A last table gives the memory a rank needs for either. The formulas are those
of tide_mega.memory.traffic; the memory of a whole step, activations included, is in tide_mega.config.device_memory
and is checked against `cluster.memory_gb` before a training starts.
"""

import importlib.util
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tide_mega.config.command_line import tool_entry
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.data.tokenizer import load_tokenizer
from tide_mega.errors import ConfigError, DataError, refuse
from tide_mega.files import write_json
from tide_mega.memory.distinct import (
    DistinctTypes,
    PlanOptions,
    Sequences,
    is_prepared,
    measure,
    open_prepared,
    tokenise,
    validate_plan_options,
)
from tide_mega.memory.traffic import GIGA, Layout, Tables, dense_sync, exchange, owner_memory, plain_memory
from tide_mega.text_table import aligned


def plan(options: PlanOptions) -> dict[str, Any]:
    """Measure the text and apply the formulas; return what `out` receives.

    Raises:
        ConfigError: an option is wrong.
        DataError: the text cannot be used.
    """
    validate_plan_options(options)
    layout = Layout(options.tensor, options.data, options.pipeline, options.sequence_parallel)
    sequences = _open_text(options)
    vocab = options.vocab or sequences.vocab
    types = [
        measure(
            sequences,
            tokens,
            owners=layout.owners,
            vocab=vocab,
            order=options.order,
            most_steps=options.most_steps,
        )
        for tokens in options.tokens
    ]
    kept = next(found.mean for found in types if found.tokens == options.memory_tokens)
    moved, memory = [], []
    for blocks in options.blocks:
        tables = Tables(vocab, blocks, options.width)
        moved += [_moved(tables, layout, found, options.gigabits) for found in types]
        microbatch = options.micro_batch * options.seq_length
        plain = plain_memory(tables, layout, microbatch, in_flight=options.in_flight)
        for name, kinds in (("plain", plain), ("owners", owner_memory(tables, layout, kept))):
            memory.append({"blocks": blocks, "approach": name, "bytes": kinds, "total": sum(kinds.values())})
    return {
        "options": {**asdict(options), "vocab": vocab},
        "sequences": sequences.count,
        "types": [asdict(found) for found in types],
        "traffic": moved,
        "memory": memory,
    }


def _moved(tables: Tables, layout: Layout, found: DistinctTypes, gigabits: float) -> dict[str, Any]:
    dense = dense_sync(tables, layout)
    whole = exchange(tables, layout, found.mean)
    mean, most = whole.between(), exchange(tables, layout, found.most).between()
    dealt, blocks = (
        exchange(tables, layout, found.mean, skew=skew).between()
        for skew in (found.skew_cyclic, found.skew_blocks)
    )
    return {
        "blocks": tables.blocks,
        "tokens": found.tokens,
        "dense": asdict(dense),
        "exchange": asdict(whole),
        "dense_bytes": dense.each_way,
        "exchange_bytes": mean.each_way,
        "in_replica_bytes": whole.inside().each_way,
        "times_fewer": dense.each_way / mean.each_way if mean.each_way else None,
        "times_fewer_at_most_types": dense.each_way / most.each_way if most.each_way else None,
        "dense_ms": 1e3 * dense.seconds(gigabits),
        "exchange_ms": 1e3 * mean.seconds(gigabits),
        "exchange_ms_round": 1e3 * dealt.seconds(gigabits),
        "exchange_ms_blocks": 1e3 * blocks.seconds(gigabits),
    }


def _open_text(options: PlanOptions) -> Sequences:
    if is_prepared(options.text):
        return open_prepared(options.text[0], options.seq_length)
    print(f"tokenising {', '.join(options.text)}", file=sys.stderr)
    return tokenise(
        options.text,
        load_tokenizer(options.tokenizer or _installed_tokenizer()),
        options.seq_length,
        most_tokens=options.max_tokens,
        suffixes=options.suffixes,
        text_key=options.text_key,
        max_document_bytes=options.max_document_bytes,
    )


def _installed_tokenizer() -> Path:
    found = importlib.util.find_spec("llama_models")
    if found is None or not found.submodule_search_locations:
        refuse(
            "tokenizer", None, "needs the package llama_models, which is absent", "give a tokenizer's file"
        )
    return Path(found.submodule_search_locations[0]) / "llama3" / "tokenizer.model"


def show(found: dict[str, Any]) -> str:
    """Return the tables of a plan as text."""
    options = PlanOptions(**found["options"])
    layout = f"tensor {options.tensor} x data {options.data} x pipeline {options.pipeline}"
    return "\n\n".join(
        [
            f"Distinct token types U in a rank's step: {', '.join(options.text)}, {options.order} sequences of "
            f"{options.seq_length:,}\n{_types_table(found['types'])}",
            f"Bytes of a rank in a step, each way: {layout}, V = {options.vocab:,}, "
            f"d = {options.width:,}, bf16 rows and gradients; ms at {options.gigabits:g} Gb/s\n"
            f"{_traffic_table(found['traffic'])}",
            f"Rows asked of the busiest of {options.tensor * options.data} owners, times the mean, for ids dealt "
            "round (id mod owners) and for blocks of neighbouring ids; and the ms if all wait for that owner\n"
            f"{_skew_table(found['types'], found['traffic'], options.blocks)}",
            f"GB a rank needs for tables and rows, beside the base model: {layout}, microbatches of "
            f"{options.micro_batch} x {options.seq_length:,}, steps of {options.memory_tokens:,} tokens a rank\n"
            f"{_memory_table(found['memory'])}",
        ]
    )


def _types_table(types: list[dict[str, Any]]) -> str:
    rows = []
    for t in types:
        seen = "-" if t["seen_before"] is None else f"{t['seen_before']:.0%}"
        per_type = t["tokens"] / t["mean"]
        rows.append(f"{t['tokens']:,} {t['steps']} {t['mean']:,.0f} {t['most']:,} {per_type:.1f} {seen}")
    return _aligned("tokens steps mean_U most_U tokens/type in_step_before", rows)


def _traffic_table(traffic: list[dict[str, Any]]) -> str:
    rows = []
    for b in traffic:
        fewer = ["-" if b[k] is None else f"{b[k]:.1f}" for k in ("times_fewer", "times_fewer_at_most_types")]
        rows.append(
            f"{b['blocks']} {b['tokens']:,} {b['dense_bytes'] / GIGA:.3f} {b['exchange_bytes'] / GIGA:.3f} "
            f"{' '.join(fewer)} {b['dense_ms']:.1f} {b['exchange_ms']:.1f} {b['in_replica_bytes'] / GIGA:.3f}"
        )
    return _aligned(
        "K tokens dense_GB exchange_GB times_fewer at_most_U dense_ms exchange_ms in_replica_GB", rows
    )


def _skew_table(types: list[dict[str, Any]], traffic: list[dict[str, Any]], blocks: list[int]) -> str:
    rows = []
    for t in types:
        slowed = [b for b in traffic if b["tokens"] == t["tokens"]]
        ms = " ".join(f"{b['exchange_ms_round']:.1f} {b['exchange_ms_blocks']:.1f}" for b in slowed)
        rows.append(f"{t['tokens']:,} {t['skew_cyclic']:.2f} {t['skew_blocks']:.2f} {ms}")
    head = " ".join(f"K={k},_round,_ms K={k},_blocks,_ms" for k in blocks)
    return _aligned(f"tokens round blocks {head}", rows)


def _memory_table(memory: list[dict[str, Any]]) -> str:
    rows = []
    for m in memory:
        gigabytes = " ".join(f"{value / GIGA:.3f}" for value in (*m["bytes"].values(), m["total"]))
        rows.append(f"{m['blocks']} {m['approach']} {gigabytes}")
    return _aligned("K approach weights gradients optimizer M_or_rows their_gradient total", rows)


def _aligned(head: str, rows: list[str]) -> str:
    """Return right-aligned columns; cells are separated by spaces, and _ in the header becomes a space."""
    return aligned([[word.replace("_", " ") for word in head.split()]], [row.split() for row in rows])


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status: 0, 1 for bad text, 2 for a bad option."""
    options = parse_tool_cli(PlanOptions, argv, doc=__doc__ or "")
    try:
        found = plan(options)
        print(show(found))
        if options.out is not None:
            write_json(Path(options.out), found)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    tool_entry(main)
