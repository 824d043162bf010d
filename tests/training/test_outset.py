"""Runs that are continued with another batch or length, and runs that branch from others."""

import json
import logging
import math
import shutil
from dataclasses import asdict

import pytest

from tests.support.runs import tiny, train_here, train_until
from tide_mega.checkpoint import CheckpointError, TrainingState
from tide_mega.errors import ConfigError
from tide_mega.metrics.jsonl import read_metrics
from tide_mega.run.course import Course
from tide_mega.run.folder import RunFolder
from tide_mega.training import loggers
from tide_mega.training.optimizer import Schedule
from tide_mega.training.outset import Origin, Outset, check_outset

TOKENS = (
    *("trainer.max_steps=null", "trainer.max_tokens=640", "trainer.global_batch_size=2"),
    *("trainer.micro_batch_size=1", "checkpoint.every=6", "logging.every=1"),
)


def said_while(function, config):
    """Call `function` in a pool's worker; return what the log said, and the sentence of a refusal."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("tide_mega")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        return function(config), said
    except (ConfigError, CheckpointError) as error:
        return str(error), said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def train_in(pools, config):
    ((result, said),) = pools(1).run(said_while, train_here, config)
    return result, said


def lines_of(folder, kind="train"):
    return [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == kind]


@pytest.fixture(scope="module")
def stopped(pools, tiny_data, tmp_path_factory):
    """A run that is promised 640 tokens, stopped after 6 steps of 64."""
    root = tmp_path_factory.mktemp("stopped")
    assert pools(1).run(train_until, tiny(tiny_data, root, *TOKENS), 7) == [7]
    return root


@pytest.mark.parametrize(("batch", "steps"), [(4, 8), (1, 14)])
def test_a_run_has_its_tokens_after_the_batch_changed(pools, tiny_data, stopped, tmp_path, batch, steps):
    root = shutil.copytree(stopped, tmp_path / "runs")
    config = tiny(tiny_data, root, *TOKENS, f"trainer.global_batch_size={batch}")
    result, said = train_in(pools, config)
    assert result == steps
    train, evaluations = lines_of(root / "tiny"), lines_of(root / "tiny", "eval")
    assert [(r["step"], r["tokens"]) for r in train[6:]] == [
        (step, 384 + (step - 6) * batch * 32) for step in range(7, steps + 1)
    ]
    assert (evaluations[-1]["step"], evaluations[-1]["tokens"]) == (steps, 640)
    assert json.loads((root / "tiny" / "summary.json").read_text())["is_complete"]
    # The schedule is that of the first start, in tokens: the warm-up ends at 128, 384 is halfway to 640.
    assert train[6]["lr"] == pytest.approx((3e-4 + 3e-3) / 2, rel=1e-12)
    assert train[2]["lr"] == pytest.approx(3e-3)
    assert any("it keeps the first" in line for line in said)


@pytest.fixture(scope="module")
def with_a_rest(pools, tiny_data, tmp_path_factory):
    """A run whose third step has 3 sequences left, in one microbatch."""
    return train_with_a_rest(
        pools, tiny_data, tmp_path_factory.mktemp("rest"), 1, "trainer.micro_batch_size=8"
    )


def train_with_a_rest(pools, data, root, world, *words):
    promise = ("trainer.max_steps=null", f"trainer.max_tokens={2 * 256 + 70}", "optim.warmup_steps=1")
    config = tiny(data, root, *promise, "logging.every=1", "checkpoint.every=0", *words, world_size=world)
    assert pools(world).run(train_here, config) == [3] * world
    return root / "tiny"


def test_the_last_batch_is_what_is_left_of_the_tokens(with_a_rest):
    live, train = (lines_of(with_a_rest, kind) for kind in ("live", "train"))
    assert [sum(r["count_by_bin"].values()) for r in live] == [256, 256, 3 * 32]
    assert [r["tokens"] for r in train] == [256, 512, 608]
    assert live[-1]["loss"] == pytest.approx(train[-1]["loss"], rel=1e-6)
    state = json.loads((with_a_rest / "checkpoints" / "step-00000003" / "state.json").read_text())
    progress = state["progress"]
    assert [progress[name] for name in ("samples", "tokens", "consumed_tokens", "batches")] == [
        19,
        608,
        608,
        3,
    ]


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (1, ("trainer.micro_batch_size=2", "memory.window=2")),  # 2, 1, 0 and 0 sequences
        (2, ("memory.owners=tensor_data",)),  # one replica has none
        pytest.param(2, ("parallel=pp2",), marks=pytest.mark.slow),
        pytest.param(4, ("parallel=tp2_pp2",), marks=pytest.mark.slow),
    ],
)
def test_every_sequence_of_a_smaller_last_batch_weighs_the_same(
    pools, tiny_data, tmp_path, with_a_rest, world, words
):
    folder = train_with_a_rest(pools, tiny_data, tmp_path, world, *words)
    for here, there in zip(lines_of(folder), lines_of(with_a_rest), strict=True):
        for name in ("loss", "grad_norm", "grad_norm_tables"):
            assert here[name] == pytest.approx(there[name], rel=1e-5), (name, here["step"])
        assert here["null_weight_by_layer"] == pytest.approx(there["null_weight_by_layer"], rel=1e-4)
    (here,), (there,) = (lines_of(f, "eval") for f in (folder, with_a_rest))
    assert here["loss"] == pytest.approx(there["loss"], rel=1e-6)


@pytest.fixture
def parent(tiny_runs, tmp_path):
    """A run of 6 steps with checkpoints at 3 and 6."""
    return shutil.copytree(tiny_runs[0], tmp_path / "runs" / "k0")


def words_of(*words):
    return ("memory=none", "checkpoint.keep_every=3", "run.name=k0", "logging.every=1", *words)


def rates_of(folder):
    return {r["step"]: r["lr"] for r in lines_of(folder)}


@pytest.mark.parametrize("reschedule", [False, True])
def test_a_longer_run_keeps_its_schedule_unless_asked_and_tells_both_rates(
    pools, tiny_data, parent, reschedule
):
    words = words_of("trainer.max_steps=9", f"optim.reschedule={str(reschedule).lower()}")
    config = tiny(tiny_data, parent.parent, *words)
    result, said = train_in(pools, config)
    assert result == 9
    rates = rates_of(parent)
    new = [3e-4 + 2.7e-3 * (1 + math.cos(math.pi * (step - 2) / 7)) / 2 for step in (6, 7, 8)]
    wanted = new if reschedule else [3e-4] * 3
    assert [rates[step] for step in (7, 8, 9)] == pytest.approx(wanted, rel=1e-12)
    (line,) = [line for line in said if line.startswith("learning rate of step 7")]
    assert (
        f"3.00e-04 by the run's schedule (cosine, 3.00e-03 at 2, 3.00e-04 at 6), {new[0]:.2e} by that of"
        in line
    )
    assert "trainer.max_steps=9" in line
    assert ("changes to the second" if reschedule else "keeps the first") in line
    # What was settled stays, also where nobody asks again.
    again, said = train_in(pools, tiny(tiny_data, parent.parent, *words_of("trainer.max_steps=10")))
    assert again == 10
    assert rates_of(parent)[10] == pytest.approx(3e-4)
    assert any("keeps the first" in line for line in said)


def branch(data, parent, *words, name="branch"):
    return tiny(data, parent.parent, *words_of(f"run.name={name}", *words))


def test_a_branch_that_changes_nothing_is_its_parent_to_the_last_bit(pools, tiny_data, parent):
    result, said = train_in(pools, branch(tiny_data, parent, f"run.from={parent}@3"))
    assert result == 6
    folder = parent.parent / "branch"
    (there,), (here,) = ([r for r in lines_of(f, "eval") if r["step"] == 6] for f in (parent, folder))
    assert here == there
    assert [r["step"] for r in lines_of(folder)] == [4, 5, 6]
    assert any(line.endswith("after 768 tokens; what differs: nothing") for line in said)
    assert any("goes on after 24 sequences" in line for line in said)
    origin = json.loads((folder / "origin.json").read_text())
    assert (origin["run"], origin["step"], origin["tokens"]) == (str(parent), 3, 768)
    state = json.loads((folder / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["progress"]["extra"]["origin"] == origin
    assert state["progress"]["samples"] == 48
    assert f"from: {parent}@3" in (folder / "config.yaml").read_text()


def test_a_decay_is_branched_off_with_another_batch_schedule_and_order(pools, tiny_data, parent):
    words = ("optim.schedule=wsd", "optim.cooldown_steps=2", "optim.rewarmup_steps=2", "data.seed=7")
    more = ("trainer.max_steps=11", "trainer.global_batch_size=4", f"run.from={parent}")
    result, said = train_in(pools, branch(tiny_data, parent, *words, *more))
    assert result == 11
    lines = lines_of(parent.parent / "branch")
    rates = {r["step"]: r["lr"] for r in lines}
    fallen = 3e-4 + 2.7e-3 * (1 - math.sqrt(0.5))
    wanted = [3e-4, (3e-4 + 3e-3) / 2, 3e-3, 3e-3, fallen]
    assert [rates[step] for step in range(7, 12)] == pytest.approx(wanted, rel=1e-12)
    assert [r["tokens"] for r in lines] == [6 * 256 + n * 128 for n in range(1, 6)]
    assert any("data: not the parent's, or in another order (data.seed)" in line for line in said)
    differing = next(line for line in said if "what differs" in line)
    assert "optim.schedule (there 'cosine', here 'wsd')" in differing
    assert "trainer.global_batch_size (there 8, here 4)" in differing
    state = json.loads((parent.parent / "branch/checkpoints/step-00000011/state.json").read_text())[
        "progress"
    ]
    assert (state["samples"], state["tokens"]) == (5 * 4, 6 * 256 + 5 * 128)


def test_a_damaged_checkpoint_is_not_branched_from(pools, tiny_data, parent):
    newest = parent / "checkpoints" / "step-00000006"
    data = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    longer = ("trainer.max_steps=7", "trainer.eval_every=0", "trainer.eval_sequences=2")
    result, _ = train_in(pools, branch(tiny_data, parent, f"run.from={parent}@6", *longer))
    assert result.startswith(f"{newest} cannot be branched from: ") and data.name in result
    result, said = train_in(pools, branch(tiny_data, parent, f"run.from={parent}", *longer))
    assert result == 7
    assert any(line.startswith(f"skipped {newest}: ") for line in said)
    assert json.loads((parent.parent / "branch" / "origin.json").read_text())["step"] == 3
    assert newest.is_dir()  # another run's folder is left as it is


def test_a_branch_does_not_branch_again(pools, tiny_data, parent):
    asked = branch(tiny_data, parent, f"run.from={parent}", "checkpoint.every=9", "trainer.max_steps=10")
    assert pools(1).run(train_until, asked, 8) == [8]
    assert not list((parent.parent / "branch").glob("checkpoints/step-*"))
    # No checkpoint of its own yet: the same step of the parent, which has gone on since.
    shutil.copytree(parent / "checkpoints" / "step-00000003", parent / "checkpoints" / "step-00000009")
    unnamed = branch(tiny_data, parent, "checkpoint.every=9", "trainer.max_steps=10")
    assert pools(1).run(train_until, unnamed, 9) == [9]
    folder = parent.parent / "branch"
    assert [r["step"] for r in lines_of(folder)] == [7, 8, 9]
    origin = json.loads((folder / "origin.json").read_text())
    assert (origin["step"], origin["tokens"]) == (6, 6 * 256)
    shutil.rmtree(parent)
    assert pools(1).run(train_here, asked) == [10]
    assert [r["step"] for r in lines_of(folder)] == [7, 8, 9, 10]


REFUSALS = {
    "no run": (("run.from={root}/none@3",), "names no run: there is no {root}/none/config.yaml"),
    "no such step": (
        ("run.from={root}/k0@4",),
        "asks for step 4, of which {root}/k0 has no checkpoint: use one of 3, 6.",
    ),
    "itself": (("run.from={root}/k0@3", "run.name=k0", "checkpoint.resume=false"), "is the run itself"),
    "no checkpoints": (("run.from={root}/empty",), "branches from a run without checkpoints, {root}/empty"),
    "another model": (
        ("run.from={root}/k0@3", "memory=k4"),
        "step-00000003 holds another model, with memory.num_blocks=0 (now 4): give these the values they had, or "
        "branch from another run.",
    ),
    "its length already": (
        ("run.from={root}/k0",),
        "trainer.max_steps=6 is reached where the run branches, at 6: give more.",
    ),
    "too long a cooldown": (
        ("run.from={root}/k0@3", "optim.schedule=wsd", "optim.cooldown_steps=4"),
        "optim.cooldown_steps=4 is longer than what is left after the branch, 3 steps: use at most 3, or train",
    ),
    "too long a re-warm-up": (
        ("run.from={root}/k0@3", "optim.rewarmup_steps=3"),
        "optim.rewarmup_steps=3 is not below the branch's 3 steps: use at most 2, or train longer.",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_branched_from_is_refused_before_anything_is_loaded(tiny_data, parent, name):
    words, sentence = REFUSALS[name]
    root = parent.parent
    (root / "empty").mkdir()
    shutil.copy(parent / "config.yaml", root / "empty")
    config = branch(tiny_data, parent, *(word.format(root=root) for word in words))
    with pytest.raises(ConfigError) as refusal:
        check_outset(config, Course.of(config))
    assert sentence.format(root=root) in str(refusal.value)


@pytest.mark.parametrize(
    "words",
    [
        ("optim.schedule=wsd",),
        ("optim.schedule=wsd", "optim.cooldown_steps=3"),
        ("optim.decay_steps=3",),
        ("optim.rewarmup_steps=2", "trainer.max_steps=null", "trainer.max_tokens=1600"),
    ],
)
def test_a_branch_may_have_any_schedule_that_fits(tiny_data, parent, words):
    config = branch(tiny_data, parent, f"run.from={parent}@3", *words)
    check_outset(config, Course.of(config))


def test_a_folder_holds_one_branch(tiny_data, parent):
    folder = parent.parent / "branch"
    folder.mkdir()
    checkpoint = parent.parent / "gone/k0/checkpoints/step-00000003"
    origin = Origin("elsewhere/k0", str(checkpoint), "id", 3, 768, 24, True, 1e-3, {}, None)
    (folder / "origin.json").write_text(json.dumps(asdict(origin)))
    moved = branch(tiny_data, parent, f"run.from={parent}@3")
    check_outset(moved, Course.of(moved))
    unnamed = branch(tiny_data, parent)
    with pytest.raises(ConfigError, match=r"gone/k0@3 names no run"):
        check_outset(unnamed, Course.of(unnamed))
    for word in (f"run.from={parent}@6", f"run.from={parent.parent}/other@3"):
        other = branch(tiny_data, parent, word)
        with pytest.raises(ConfigError, match=r"is a branch of elsewhere/k0@3: choose another run.name"):
            check_outset(other, Course.of(other))


def test_a_schedule_that_does_not_fit_is_refused_before_anything_is_loaded(tiny_data, tmp_path):
    config = tiny(tiny_data, tmp_path, "optim.warmup_steps=6")
    with pytest.raises(ConfigError, match=r"^optim.warmup_steps=6 is not below the run's 6 steps"):
        check_outset(config, Course.of(config))


def test_wandb_knows_the_schedule_and_the_origin(monkeypatch, tiny_data, tmp_path):
    given = {}

    class Logger:
        run_id = None

        def __init__(self, *_, **values):
            given.update(values)

    monkeypatch.setattr(loggers, "WandbLogger", Logger)
    config = tiny(tiny_data, tmp_path, "run.from=runs/a@3")
    schedule = Schedule.of(config.optim, Course.of(config))
    state = TrainingState(step=3, extra={"origin": {"run": "runs/a"}})
    folder = RunFolder(tmp_path)
    outset = Outset(state, schedule, is_resumed=False)
    loggers.open_loggers(config, folder, outset, total_steps=6, evaluates_again=False)
    assert given["run_config"]["origin"] == {"run": "runs/a"}
    assert given["run_config"]["schedule"] == schedule.to_json()
    assert given["run_config"]["run"]["from"] == "runs/a@3"
