"""Maps records to the names and values that go to Weights & Biases."""

import math
from typing import Any

from tide_mega.metrics.deciles import BySlot
from tide_mega.metrics.records import EvalRecord, EventRecord, LiveRecord, Record, TrainRecord, WeightsRecord


def metrics_of(record: Record) -> dict[str, float]:
    """Return the metrics of a record by their names in W&B."""
    match record:
        case TrainRecord():
            return train_metrics(record)
        case EvalRecord():
            return eval_metrics(record)
        case LiveRecord():
            return live_metrics(record)
        case WeightsRecord():
            return weights_metrics(record)
        case EventRecord():
            return event_metrics(record)


def train_metrics(record: TrainRecord) -> dict[str, float]:
    """Return the W&B names and values of a training record; None values are left out."""
    named = {
        "step": record.step,
        "tokens": record.tokens,
        "train/loss": record.loss,
        "train/z_loss": record.z_loss,
        "train/grad_norm": record.grad_norm,
        "train/grad_norm_tables": record.grad_norm_tables,
        "lr": record.lr,
        "throughput/tokens_per_second": record.tokens_per_second,
        "throughput/mfu": record.mfu,
        "throughput/step_seconds": record.step_seconds,
        "throughput/goodput": record.goodput,
        "throughput/memory_gb": _scaled(record.memory_bytes, 1e9),
        "throughput/peak_memory_gb": _scaled(record.peak_memory_bytes, 1e9),
        "throughput/exchanged_mb_per_step": _scaled(record.exchanged_bytes_per_step, 1e6),
        "faults/skipped_steps": record.skipped_steps,
        "faults/spikes": record.spikes,
        "faults/rollbacks": record.rollbacks,
        "faults/skipped_windows": record.skipped_windows,
        "faults/skipped_shards": record.skipped_shards,
        "faults/slowest_ratio": record.slowest_ratio,
        **_by_layer("null_weight", record.null_weight_by_layer),
    }
    for kind, moved in record.traffic.items():
        named |= {f"traffic/{kind.replace(' ', '_')}_{way}": count for way, count in moved.items()}
    return _without_none(named)


def eval_metrics(record: EvalRecord) -> dict[str, float]:
    """Return the W&B names and values of an evaluation; None values are left out."""
    named = {
        "step": record.step,
        "tokens": record.tokens,
        "eval/loss": record.loss,
        "loss/rare": record.rare,
        "loss/mid": record.mid,
        "loss/common": record.common,
        **{f"loss_by_decile/{slot}": loss for slot, loss in record.loss_by_bin.items()},
        **_by_layer("null_weight_eval", record.null_weight_by_layer),
    }
    for which, by_slot in record.null_weight_by_bin.items():
        named |= {f"null_weight_by_decile_{which}/{slot}": weight for slot, weight in by_slot.items()}
    named |= _by_slot("null_weight_by_decile_layer_{:02d}", record.null_weight_by_layer_and_bin)
    for name, text in record.texts.items():
        named |= {f"perplexity/{name}": text.perplexity, f"bits_per_byte/{name}": text.bits_per_byte}
        named |= {f"loss_by_decile_{name}/{slot}": loss for slot, loss in text.loss_by_bin.items()}
    return _without_none(named)


def live_metrics(record: LiveRecord) -> dict[str, float]:
    """Return the W&B names and values of a live record; None values are left out."""
    named = {
        **{f"train_loss_by_decile/{slot}": loss for slot, loss in record.loss_by_bin.items()},
        "train_loss/rare": record.rare,
        "train_loss/mid": record.mid,
        "train_loss/common": record.common,
        **_by_slot("train_null_weight_by_decile_layer_{:02d}", record.null_weight_by_layer_and_bin),
        **{f"table_grad_norm/block_{block:02d}": n for block, n in enumerate(record.grad_norm_by_table)},
    }
    return _without_none({"step": record.step, "tokens": record.tokens, **named})


def weights_metrics(record: WeightsRecord) -> dict[str, float]:
    """Return the W&B names and values of a record of the weights; None values are left out."""
    named = {
        **{f"embedding_norm_by_decile/{slot}": norm for slot, norm in record.embedding_norm_by_bin.items()},
        **{f"table_norm_by_decile/{slot}": norm for slot, norm in record.table_norm_by_bin.items()},
        **_by_slot("table_norm_by_decile_block_{:02d}", record.table_norm_by_block_and_bin),
    }
    for block, distance in enumerate(record.cosine_distance_to_embedding):
        named[f"table_cosine_distance/e_{block:02d}"] = distance
    for one, distances in enumerate(record.cosine_distance_between):
        for other, distance in enumerate(distances[:one]):
            named[f"table_cosine_distance/{other:02d}_{one:02d}"] = distance
    return _without_none({"step": record.step, "tokens": record.tokens, **named})


def event_metrics(record: EventRecord) -> dict[str, float]:
    """Return the W&B names and values of an event; values that are None or not numbers are left out."""
    named = {
        "step": record.step,
        "tokens": record.tokens,
        f"events/{record.event}": record.at_step,
        "events/loss": record.loss if math.isfinite(record.loss) else None,
        "events/z_score": record.z_score,
    }
    return _without_none(named)


def _by_layer(prefix: str, weights: list[float | None]) -> BySlot:
    return {f"{prefix}/layer_{layer:02d}": weight for layer, weight in enumerate(weights)}


def _by_slot(prefix: str, rows: list[BySlot]) -> BySlot:
    return {
        f"{prefix.format(row)}/{slot}": value
        for row, by_slot in enumerate(rows)
        for slot, value in by_slot.items()
    }


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _without_none(named: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in named.items() if value is not None}
