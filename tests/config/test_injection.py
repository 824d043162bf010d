import pytest

from tide_mega.config.hydra_door import compose
from tide_mega.config.validate import KINDS, parse_injection
from tide_mega.errors import ConfigError


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_with_and_without_a_rank(kind):
    alone, ranked = parse_injection(f"{kind}@12"), parse_injection(f"{kind}@12:3")
    assert (alone.kind, alone.step, alone.rank) == (kind, 12, None)
    assert (ranked.kind, ranked.step, ranked.rank, ranked.seconds) == (kind, 12, 3, 1.0)


def test_a_slow_rank_takes_seconds():
    assert parse_injection("slow@10:1:0.25").seconds == 0.25


@pytest.mark.parametrize("text", ["nan@5", "", "nan_loss", "@3", "NAN_LOSS@3"])
def test_an_unknown_kind_is_refused_in_one_sentence(text):
    with pytest.raises(
        ConfigError, match=r"(is no known fault|cannot be read)[^.]*kind@step|cannot be read"
    ) as info:
        parse_injection(text)
    assert str(info.value).startswith(f"faults.inject={text} ")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "text",
    ["kill@0", "kill@x", "kill@5:-1", "kill@5:1:2", "slow@5:1:0", "slow@5:1:nan", "slow@5:1:2:3", "kill@5:"],
)
def test_a_malformed_fault_is_refused_with_the_form_it_should_have(text):
    with pytest.raises(ConfigError, match=r"cannot be read: write (kill@step|slow@step)"):
        parse_injection(text)


def test_the_command_line_takes_a_list_and_knows_the_ranks():
    words = ["experiment=demo_tide", "trainer.micro_batch_size=4"]
    config = compose([*words, "faults.inject=[nan_loss@5,slow@10:1:0.5]"], world_size=2)
    assert config.faults.inject == ["nan_loss@5", "slow@10:1:0.5"]
    with pytest.raises(ConfigError, match="nan_grad@7:1 names a rank of 1 processes"):
        compose(["experiment=demo_tide", "faults.inject=[nan_grad@7:1]"], world_size=1)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["faults.inject=[nan_loss@551]"], "nan_loss@551 strikes after the run's 550 steps"),
        (["faults.inject=[bad_shard@5]", "data.on_bad_shard=skip"], "bad_shard@5 stops the run, and"),
        (
            ["faults.inject=[disk_full@401]", "checkpoint.every=200", "checkpoint.at_end=false"],
            r"disk_full@401 comes after the last checkpoint, at step 400 with checkpoint\.every=200",
        ),
        (
            ["faults.inject=[disk_full@1]", "checkpoint.every=0", "checkpoint.at_end=false"],
            r"disk_full@1 comes after the last checkpoint",
        ),
        (["faults.inject=[spike@5:1]", "parallel=pp2"], "spike@5:1 names a rank without a loss.*use 2 to 3"),
    ],
)
def test_a_fault_that_nothing_would_come_of_is_refused(words, why):
    with pytest.raises(ConfigError, match=why):
        compose(["experiment=demo_tide", "trainer.micro_batch_size=2", *words], world_size=4)


@pytest.mark.parametrize(
    "words",
    [
        ["faults.inject=[nan_loss@551]", "faults.on_spike=rollback"],
        ["faults.inject=[disk_full@400]", "checkpoint.every=200", "checkpoint.at_end=false"],
        ["faults.inject=[disk_full@550]", "checkpoint.every=0"],
        ["faults.inject=[spike@5:2,nan_loss@5:1]", "parallel=pp2"],
    ],
)
def test_a_fault_that_can_strike_is_accepted(words):
    compose(["experiment=demo_tide", "trainer.micro_batch_size=2", *words], world_size=4)


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("faults.hang_minutes=30", "is not below cluster.timeout_minutes=30.0"),
        ("faults.on_spike=panic", "use log, skip or rollback"),
        ("faults.spike_window=7", "use 8 or more"),
        ("faults.straggler_ratio=1", "is not above 1"),
        ("faults.max_skipped_in_a_row=0", "is not positive"),
        ("faults.max_rollbacks=-1", "is negative"),
    ],
)
def test_rules_of_the_faults_section(word, why):
    with pytest.raises(ConfigError, match=why):
        compose(["experiment=demo_tide", word])
