import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tide_mega.config.errors import ConfigError
from tide_mega.config.hydra_door import from_yaml
from tide_mega.config.schema import ClusterConfig, DataConfig, ModelConfig, RunConfig, TideConfig
from tide_mega.training.runfolder import RunFolder, open_run_folder

CPU = torch.device("cpu")


def config(root: Path, name: str = "base") -> TideConfig:
    model = ModelConfig(
        name="demo",
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=256,
        num_attention_heads=4,
        num_query_groups=4,
    )
    return TideConfig(
        model=model,
        data=DataConfig(path="data/demo"),
        cluster=ClusterConfig(name="local"),
        run=RunConfig(name=name, root=str(root)),
    )


def reopen(wanted: TideConfig, *, writes: bool = True) -> RunFolder:
    return open_run_folder(wanted, world_size=2, device=CPU, writes=writes)


def test_a_new_folder_holds_configuration_and_environment(tmp_path: Path) -> None:
    wanted = config(tmp_path / "runs")
    folder = reopen(wanted)
    assert folder.path == tmp_path / "runs" / "base"
    assert from_yaml(folder.config.read_text()) == wanted
    environment = json.loads(folder.environment.read_text())
    assert (environment["world_size"], environment["device"]) == (2, "cpu")
    assert folder.metrics == folder.path / "metrics.jsonl"
    assert folder.checkpoints.parent == folder.path


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    folder = reopen(config(tmp_path), writes=False)
    assert not folder.path.exists()


def test_the_same_run_opens_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tide_mega"):
        first, again = reopen(config(tmp_path)), reopen(config(tmp_path))
    assert first == again
    assert caplog.messages == [f"{first.path}: start 1", f"{first.path}: start 2"]


def test_what_may_change_is_logged_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = config(tmp_path)
    reopen(wanted)
    wanted.trainer.max_steps = 50
    wanted.data.num_workers = 4
    folder = reopen(wanted)
    assert from_yaml(folder.config.read_text()).trainer.max_steps == 50
    assert "trainer.max_steps (there None, now 50)" in caplog.text
    assert "data.num_workers (there 1, now 4)" in caplog.text


def test_a_moved_root_is_the_same_run(tmp_path: Path) -> None:
    folder = reopen(config(tmp_path / "a"))
    folder.path.parent.rename(tmp_path / "b")
    reopen(config(tmp_path / "b"))


@pytest.mark.parametrize("writes", [True, False])
def test_another_run_under_the_same_name_is_refused(tmp_path: Path, writes: bool) -> None:
    folder = reopen(config(tmp_path))
    before = folder.config.read_bytes()
    other = config(tmp_path)
    other.memory.num_blocks = 8
    other.optim.lr = 0.5
    with pytest.raises(ConfigError) as error:
        reopen(other, writes=writes)
    message = str(error.value)
    assert "run.name='base' is taken" in message
    assert "memory.num_blocks (there 0, now 8), optim.lr (there 0.0001, now 0.5)" in message
    assert "choose another run.name" in message
    assert folder.config.read_bytes() == before


def test_only_the_first_differences_are_named(tmp_path: Path) -> None:
    reopen(config(tmp_path))
    other = config(tmp_path)
    other.model = replace(other.model, num_layers=3, hidden_size=128, ffn_hidden_size=512, vocab_size=50_257)
    with pytest.raises(ConfigError, match=r"ffn_hidden_size \(there 256, now 512\) and 1 more;"):
        reopen(other)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = reopen(config(tmp_path))
    folder.config.write_text("model:\n  layers: 3\n")
    with pytest.raises(ConfigError, match=r"config\.yaml is not a configuration of this version .*run\.name"):
        reopen(config(tmp_path))
    folder.config.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"config\.yaml is not a configuration of this version"):
        reopen(config(tmp_path))
