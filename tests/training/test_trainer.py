"""Whole small trainings: what they log, how they resume, what they refuse."""

import json
import math

import pytest
import torch.distributed as dist

from tests.support.runs import curve, tiny, train_here, train_until
from tide_mega.errors import ConfigError
from tide_mega.metrics.jsonl import read_metrics
from tide_mega.training.trainer import DivergedError


def train_in(pools, config, world=1):
    return pools(world).run(train_here, config)


def refusal(config):
    try:
        train_here(config)
    except (ConfigError, DivergedError) as error:
        return type(error).__name__, str(error)
    return None


@pytest.fixture(scope="module")
def finished(pools, tiny_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    assert train_in(pools, tiny(tiny_data, root)) == [6]
    return root / "tiny"


def groups_after(config):
    train_here(config)
    return len(dist.distributed_c10d._world.pg_map)


def test_a_training_leaves_no_group_behind(pools, tiny_data, tmp_path):
    counts = [
        pools(1).run(groups_after, tiny(tiny_data, tmp_path, f"run.name=r{n}", "trainer.max_steps=3"))
        for n in range(2)
    ]
    assert counts[0] == counts[1]


def test_a_run_logs_every_metric(finished):
    records = read_metrics(finished / "metrics.jsonl")
    assert [(r["kind"], r["step"]) for r in records] == [
        ("train", 2),
        ("live", 2),
        ("eval", 3),
        ("weights", 3),
        ("train", 4),
        ("live", 4),
        ("train", 6),
        ("live", 6),
        ("eval", 6),
        ("weights", 6),
    ]
    train, evaluation = records[-4], records[-2]
    assert train["tokens"] == evaluation["tokens"] == 6 * 8 * 32
    assert 0 < train["loss"] < math.log(640) + 1
    assert train["z_loss"] == pytest.approx(1e-6 * math.log(640) ** 2, rel=0.3)
    assert 0 < train["grad_norm_tables"] < train["grad_norm"]
    assert len(train["null_weight_by_layer"]) == 2
    assert all(0 < weight < 1 for weight in train["null_weight_by_layer"])
    assert train["mfu"] > 0
    assert len(evaluation["null_weight_by_bin"]["mean"]) == 12
    by_layer = evaluation["null_weight_by_layer_and_bin"]
    assert by_layer[-1] == evaluation["null_weight_by_bin"]["last"] and len(by_layer) == 2
    assert 0 < train["memory_bytes"] <= train["peak_memory_bytes"]
    assert train["exchanged_bytes_per_step"] == 0
    assert records[0]["loss"] > train["loss"]


def test_deciles_add_up_to_the_whole(finished):
    evaluation = read_metrics(finished / "metrics.jsonl")[-2]
    counts, losses = evaluation["count_by_bin"], evaluation["loss_by_bin"]
    assert sum(counts.values()) == 10 * 32
    total = sum(counts[slot] * losses[slot] for slot in counts if counts[slot])
    assert total / sum(counts.values()) == pytest.approx(evaluation["loss"], rel=1e-12)


def test_live_lines_count_every_training_token_by_decile(finished):
    records = read_metrics(finished / "metrics.jsonl")
    of_kind = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "live")}
    assert [live["first_step"] for live in of_kind["live"]] == [1, 3, 5]
    for train, live in zip(of_kind["train"], of_kind["live"], strict=True):
        counts, losses = live["count_by_bin"], live["loss_by_bin"]
        assert sum(counts.values()) == 2 * 8 * 32
        total = math.fsum(counts[slot] * losses[slot] for slot in counts if counts[slot])
        assert total / sum(counts.values()) == pytest.approx(live["loss"], rel=1e-14)
        assert live["loss"] == pytest.approx(train["loss"], rel=1e-6)
        squares = math.fsum(norm**2 for norm in live["grad_norm_by_table"])
        assert squares == pytest.approx(train["grad_norm_tables"] ** 2, rel=1e-14)
        assert len(live["null_weight_by_layer_and_bin"]) == 2


def test_without_diagnostics_the_lines_are_the_plain_ones(pools, tiny_data, tmp_path, finished):
    config = tiny(tiny_data, tmp_path, "logging.diagnostics=false")
    assert train_in(pools, config) == [6]
    plain = [r for r in curve(finished / "metrics.jsonl") if r["kind"] in ("train", "eval")]
    records = curve(tmp_path / "tiny" / "metrics.jsonl")
    assert records == plain
    assert read_metrics(tmp_path / "tiny" / "metrics.jsonl")[0]["memory_bytes"] is None


def test_evaluations_do_not_count_as_traffic_of_the_steps(pools, tiny_data, tmp_path):
    lines = []
    for every in (0, 3):
        words = ("memory.owners=tensor_data", f"trainer.eval_every={every}", "checkpoint.every=0")
        root = tmp_path / str(every)
        train_in(pools, tiny(tiny_data, root, *words, world_size=2), 2)
        records = [r for r in read_metrics(root / "tiny" / "metrics.jsonl") if r["kind"] == "train"]
        lines.append([(r["step"], r["traffic"], r["exchanged_bytes_per_step"]) for r in records])
    assert lines[0] == lines[1]
    assert all(traffic["rows"]["sent"] > 0 for _, traffic, _ in lines[0])


def test_rows_read_ahead_count_in_the_step_that_uses_them(pools, tiny_data, tmp_path):
    lines = []
    for ahead in ("false", "true"):
        words = ("memory.owners=tensor_data", f"memory.exchange_ahead={ahead}", "logging.every=1")
        train_in(pools, tiny(tiny_data, tmp_path / ahead, *words, world_size=2), 2)
        records = [
            r for r in read_metrics(tmp_path / ahead / "tiny" / "metrics.jsonl") if r["kind"] == "train"
        ]
        lines.append([(r["step"], r["traffic"], r["exchanged_bytes_per_step"]) for r in records])
    assert [step for step, *_ in lines[0]] == [1, 2, 3, 4, 5, 6]
    assert lines[0] == lines[1]


def test_the_run_folder_says_what_ran(finished):
    assert "num_blocks: 2" in (finished / "config.yaml").read_text()
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["world_size"] == 1
    assert environment["packages"]["megatron-core"]


@pytest.mark.parametrize("blocks", ["none", "k2"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(pools, tiny_data, tmp_path, blocks):
    # The checkpoint at step 3 lies between two log lines: their averages must survive too.
    overrides = (f"memory={blocks}", "checkpoint.every=3")
    train_in(pools, tiny(tiny_data, tmp_path / "whole", *overrides))
    broken = tiny(tiny_data, tmp_path / "broken", *overrides)
    assert pools(1).run(train_until, broken, 5) == [5]
    assert train_in(pools, broken) == [6]
    whole, resumed = (curve(tmp_path / name / "tiny" / "metrics.jsonl") for name in ("whole", "broken"))
    assert resumed == whole
    assert train_in(pools, broken) == [6]
    assert curve(tmp_path / "broken" / "tiny" / "metrics.jsonl") == whole


def test_two_replicas_resume_to_the_last_bit(pools, tiny_data, tmp_path):
    overrides = ("checkpoint.every=3", "parallel.zero_stage=2")
    whole = tiny(tiny_data, tmp_path / "whole", *overrides, world_size=2)
    assert train_in(pools, whole, 2) == [6, 6]
    broken = tiny(tiny_data, tmp_path / "broken", *overrides, world_size=2)
    assert pools(2).run(train_until, broken, 4) == [4, 4]
    assert train_in(pools, broken, 2) == [6, 6]
    curves = [curve(tmp_path / name / "tiny" / "metrics.jsonl") for name in ("whole", "broken")]
    losses = [[r["loss"] for r in records if r["kind"] in ("train", "eval")] for records in curves]
    assert losses[1] == pytest.approx(losses[0], rel=1e-14)
    assert [[r for r in records if r["kind"] in ("live", "weights")] for records in curves][1:] == [
        [r for r in curves[0] if r["kind"] in ("live", "weights")]
    ]


def test_data_and_tensor_parallel_runs_have_the_single_process_curve(pools, tiny_data, tmp_path, finished):
    expected = curve(finished / "metrics.jsonl")
    for name, overrides in {
        "dp2": (),
        "tp2": ("parallel=tp2", "parallel.sequence_parallel=true"),
    }.items():
        config = tiny(tiny_data, tmp_path / name, *overrides, world_size=2)
        assert train_in(pools, config, 2) == [6, 6]
        records = curve(tmp_path / name / "tiny" / "metrics.jsonl")
        for record, wanted in zip(records, expected, strict=True):
            if record["kind"] not in ("train", "eval"):  # test_topologies has these
                continue
            assert record["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
            if record["kind"] == "train":
                assert record["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
                assert record["grad_norm_tables"] == pytest.approx(wanted["grad_norm_tables"], rel=1e-4)
                assert record["null_weight_by_layer"] == pytest.approx(
                    wanted["null_weight_by_layer"], rel=1e-4
                )
            else:
                assert record["count_by_bin"] == wanted["count_by_bin"]
                for slot, loss in wanted["loss_by_bin"].items():
                    assert record["loss_by_bin"][slot] == (loss and pytest.approx(loss, rel=1e-5))


def test_a_run_goes_on_at_another_topology_with_the_same_curve(pools, tiny_data, tmp_path, finished):
    config = tiny(tiny_data, tmp_path)
    assert pools(1).run(train_until, config, 5) == [5]
    elsewhere = tiny(tiny_data, tmp_path, "parallel=tp2", "memory.owners=tensor_data", world_size=2)
    assert train_in(pools, elsewhere, 2) == [6, 6]
    records = curve(tmp_path / "tiny" / "metrics.jsonl")
    for record, wanted in zip(records, curve(finished / "metrics.jsonl"), strict=True):
        assert record["kind"] == wanted["kind"]
        if "loss" in record:
            assert record["loss"] == pytest.approx(wanted["loss"], rel=1e-6)


def test_another_model_is_refused_by_name(pools, tiny_data, tmp_path):
    config = tiny(tiny_data, tmp_path)
    assert pools(1).run(train_until, config, 5) == [5]
    (tmp_path / "tiny" / "config.yaml").unlink()
    ((kind, message),) = pools(1).run(refusal, tiny(tiny_data, tmp_path, "memory=k4"))
    assert kind == "ConfigError"
    assert "step-00000003 holds another model, with memory.num_blocks=2 (now 4)" in message


def test_a_vocabulary_larger_than_the_model_is_refused(pools, tiny_data, tmp_path):
    config = tiny(tiny_data, tmp_path, "model.vocab_size=512")
    ((kind, message),) = pools(1).run(refusal, config)
    assert kind == "ConfigError"
    assert "model.vocab_size=512 is smaller than the vocabulary" in message
    assert "600" in message


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_never_finite_stops_the_run(pools, tiny_data, tmp_path, precision):
    config = tiny(tiny_data, tmp_path, "model.init_std=1e25", f"trainer.precision={precision}")
    ((kind, message),) = pools(1).run(refusal, config)
    assert kind == "DivergedError"
    assert message.startswith("5 steps in a row were skipped")
    assert "not finite at step 5" in message
    trained = [r for r in read_metrics(tmp_path / "tiny" / "metrics.jsonl") if r["kind"] == "train"]
    assert all(math.isnan(record["loss"]) for record in trained)
    assert [record["skipped_steps"] for record in trained] == [2, 4]


def test_starting_anew_keeps_the_old_checkpoints_aside(pools, tiny_data, tmp_path):
    assert train_in(pools, tiny(tiny_data, tmp_path)) == [6]
    anew = tiny(tiny_data, tmp_path, "checkpoint.resume=false", "trainer.max_steps=3")
    assert train_in(pools, anew) == [3]
    assert [p.name for p in sorted((tmp_path / "tiny" / "checkpoints").glob("step-*"))] == ["step-00000003"]
    aside = tmp_path / "tiny" / "checkpoints.replaced-1"
    assert [p.name for p in sorted(aside.glob("step-*"))] == ["step-00000003", "step-00000006"]
    records = read_metrics(tmp_path / "tiny" / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] in ("train", "eval")] == [2, 3, 3]


def test_an_unfinished_checkpoint_is_not_resumed_from(pools, tiny_data, tmp_path):
    config = tiny(tiny_data, tmp_path)
    assert pools(1).run(train_until, config, 5) == [5]
    checkpoints = tmp_path / "tiny" / "checkpoints"
    (checkpoints / "step-00000005.partial").mkdir()
    assert train_in(pools, config) == [6]
    assert [p.name for p in sorted(checkpoints.glob("step-*"))] == ["step-00000003", "step-00000006"]


def test_only_the_newest_checkpoints_are_kept(pools, tiny_data, tmp_path):
    config = tiny(tiny_data, tmp_path, "checkpoint.every=1", "checkpoint.keep_last=3")
    assert train_in(pools, config) == [6]
    names = [p.name for p in sorted((tmp_path / "tiny" / "checkpoints").glob("step-*"))]
    assert names == [f"step-0000000{n}" for n in (4, 5, 6)]
