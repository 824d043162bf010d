import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tide_mega.config.hydra_door import from_yaml
from tide_mega.config.schema import ClusterConfig, DataConfig, ModelConfig, RunConfig, TideConfig
from tide_mega.data.index import DatasetIndex, ShardRecord, SplitRecord, TokenizerRecord, Totals
from tide_mega.errors import ConfigError
from tide_mega.run.course import STEPS, Course
from tide_mega.run.folder import RunFolder, finished_run, open_run_folder

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


def test_a_change_that_a_branch_can_make_is_advised(tmp_path: Path) -> None:
    folder = reopen(config(tmp_path))
    other = config(tmp_path)
    other.optim.lr = 0.5
    advice = f"choose another run.name (run.from={folder.path} would go on from this run there), or give it"
    with pytest.raises(ConfigError, match=re.escape(advice)):
        reopen(other)
    other.memory.num_blocks = 8
    with pytest.raises(ConfigError, match=r"choose another run\.name, or give it"):
        reopen(other)


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


def prepared(folder: Path, content: str = "a") -> Path:
    """Write the index of a dataset whose one shard has this checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    shard = ShardRecord("train-000000.tar", 10, content, 5, 1, [(0, 5)])
    index = DatasetIndex(
        tokenizer=TokenizerRecord("tokenizer.json", "t", 512, 0),
        dtype="uint16",
        splits={"train": SplitRecord(5, 1, [shard])},
        totals=Totals(1, 5, 0, 0, 0, 0, {}),
    )
    index.save(folder)
    return folder


def on(root: Path, data: str) -> TideConfig:
    wanted = config(root)
    wanted.data.path = data
    return wanted


@pytest.mark.parametrize("spelling", ["data/demo/", "./data/demo", "{here}/data/demo", "link"])
def test_another_spelling_of_the_datas_path_is_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, spelling: str
) -> None:
    monkeypatch.chdir(tmp_path)
    prepared(tmp_path / "data" / "demo")
    (tmp_path / "link").symlink_to("data/demo")
    reopen(on(tmp_path, "data/demo"))
    with caplog.at_level(logging.INFO, "tide_mega"):
        reopen(on(tmp_path, spelling.format(here=tmp_path)))
    assert caplog.messages == [f"{tmp_path}/base: start 2"]


def test_data_that_moved_is_the_same_data_and_another_set_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = prepared(tmp_path / "old"), tmp_path / "new"
    folder = reopen(on(tmp_path, str(old)))
    old.rename(new)
    other = prepared(tmp_path / "other", "b")
    with caplog.at_level(logging.INFO, "tide_mega"):
        reopen(on(tmp_path, str(new)))
    assert f"data.path: reading {new}; the last start looked in {old}" in caplog.messages
    with pytest.raises(
        ConfigError, match=r"is taken: .* with another data\.path \(there '.*new', now '.*other'\)"
    ):
        reopen(on(tmp_path, str(other)))
    folder.mark_finished(SimpleNamespace(step=6, tokens=1536))
    course = Course(STEPS, total=6, batch=8, seq_length=32)
    assert finished_run(on(tmp_path, f"{new}/"), course) == folder
    with pytest.raises(ConfigError, match="is taken"):
        finished_run(on(tmp_path, str(other)), course)


def test_a_start_that_found_no_data_does_not_take_the_name(tmp_path: Path) -> None:
    reopen(on(tmp_path, str(tmp_path / "typing error")))
    data = prepared(tmp_path / "data")
    reopen(on(tmp_path, str(data)))
    reopen(on(tmp_path, str(tmp_path / "gone")))  # opening it says that there is none
    with pytest.raises(ConfigError, match="is taken"):
        reopen(on(tmp_path, str(prepared(tmp_path / "other", "b"))))


def test_other_paths_spelled_anew_are_not_called_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = config(tmp_path)
    wanted.data.perplexity_texts = ["texts/a.txt"]
    wanted.checkpoint.remote = "remote"
    reopen(wanted)
    wanted.data.perplexity_texts = [str(tmp_path / "texts" / "a.txt")]
    wanted.checkpoint.remote = "./remote/"
    reopen(wanted)
    assert caplog.messages == []
    wanted.checkpoint.remote = "elsewhere"
    reopen(wanted)
    assert "checkpoint.remote" in caplog.text and "perplexity_texts" not in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", '{"steps": null}', "\0\0"])
def test_a_damaged_note_that_the_run_is_finished_makes_it_unfinished(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = reopen(config(tmp_path))
    (folder.path / "finished.json").write_text(content)
    assert folder.finish() is None
    assert "the run counts as unfinished" in caplog.text


def test_a_configuration_that_is_no_yaml_is_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = reopen(config(tmp_path))
    folder.config.write_text("a: [b")
    with pytest.raises(ConfigError, match=r"is not a configuration of this version \(it is not YAML"):
        reopen(config(tmp_path))
