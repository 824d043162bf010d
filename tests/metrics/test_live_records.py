"""Live records: their names in W&B, and their way through metrics.jsonl."""

from dataclasses import asdict
from pathlib import Path

from tide_mega.metrics.deciles import DecileResult, NullWeightResult
from tide_mega.metrics.jsonl import JsonlLogger, read_metrics
from tide_mega.metrics.names import live_metrics, weights_metrics
from tide_mega.metrics.records import LiveRecord, WeightsRecord

LIVE = LiveRecord.of(
    10,
    20_480,
    first_step=6,
    deciles=DecileResult(4.0, 10, {"0": 7.5, "9": 3.5, "unseen": None}, {"0": 3, "9": 7}, 7.5, None, 3.5),
    null_weight=NullWeightResult([0.25, 0.5], [{"0": 0.5, "9": 0.125}, {"0": None, "9": 0.5}], {}, {}),
    grad_norm_by_table=[0.5, float("inf")],
)
WEIGHTS = WeightsRecord(
    step=10,
    tokens=20_480,
    types_by_bin={"0": 3, "9": 4},
    embedding_norm_by_bin={"0": 0.25, "9": 0.5},
    table_norm_by_bin={"0": 1.5, "9": None},
    table_norm_by_block_and_bin=[{"0": 1.0}, {"0": 2.0}, {"0": 1.5}],
    sampled_types=256,
    cosine_distance_to_embedding=[0.75, 0.875, 1.0],
    cosine_distance_between=[[0.0, 0.5, 0.25], [0.5, 0.0, 0.125], [0.25, 0.125, 0.0]],
)


def test_names_of_the_live_charts() -> None:
    assert live_metrics(LIVE) == {
        "step": 10,
        "tokens": 20_480,
        "train_loss_by_decile/0": 7.5,
        "train_loss_by_decile/9": 3.5,
        "train_loss/rare": 7.5,
        "train_loss/common": 3.5,
        "train_null_weight_by_decile_layer_00/0": 0.5,
        "train_null_weight_by_decile_layer_00/9": 0.125,
        "train_null_weight_by_decile_layer_01/9": 0.5,
        "table_grad_norm/block_00": 0.5,
        "table_grad_norm/block_01": float("inf"),
    }


def test_each_pair_of_tables_has_one_name() -> None:
    assert weights_metrics(WEIGHTS) == {
        "step": 10,
        "tokens": 20_480,
        "embedding_norm_by_decile/0": 0.25,
        "embedding_norm_by_decile/9": 0.5,
        "table_norm_by_decile/0": 1.5,
        "table_norm_by_decile_block_00/0": 1.0,
        "table_norm_by_decile_block_01/0": 2.0,
        "table_norm_by_decile_block_02/0": 1.5,
        "table_cosine_distance/e_00": 0.75,
        "table_cosine_distance/e_01": 0.875,
        "table_cosine_distance/e_02": 1.0,
        "table_cosine_distance/00_01": 0.5,
        "table_cosine_distance/00_02": 0.25,
        "table_cosine_distance/01_02": 0.125,
    }


def test_a_rewind_drops_them_like_every_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path, None)
    logger.log(LIVE)
    logger.log(WEIGHTS)
    assert read_metrics(path) == [{"kind": "live", **asdict(LIVE)}, {"kind": "weights", **asdict(WEIGHTS)}]
    logger.rewind(9)
    logger.close()
    assert read_metrics(path) == []
