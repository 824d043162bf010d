"""What an export writes, read by the safetensors library and compared with the checkpoint."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.checkpoints import config_at
from tests.support.exports import WITHOUT_MEMORY, RandomRun, random_run
from tests.support.runs import train_here
from tests.support.trained import reference_of
from tide_mega.errors import CheckpointError, ConfigError
from tide_mega.export import shards, weights
from tide_mega.export.__main__ import main
from tide_mega.export.export import export
from tide_mega.export.names import llama_name
from tide_mega.export.options import ExportOptions
from tide_mega.hf.memory_tide import RowFormat, open_store
from tide_mega.trained.run import TrainedRun


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def assert_weights(run: TrainedRun, folder: Path) -> None:
    found = tensors_of(folder)
    for name in run.weights.shapes:
        stored = run.weights.tensor(name)
        if name == "memory.tables":
            parts = [
                found.pop(f"model.memory.tables.{i}")
                for i in range(len(found))
                if f"model.memory.tables.{i}" in found
            ]
            assert torch.equal(torch.cat(parts), stored)
        elif name == "memory.gains":
            assert torch.equal(found.pop("model.memory.gains"), stored)
        else:
            assert torch.equal(found.pop(llama_name(name)), stored)
    assert not found


@torch.no_grad()
def memory_of(run: TrainedRun) -> torch.Tensor:
    """Return M of every token [V, K, D]."""
    return reference_of(run).memory(torch.arange(run.config.model.vocab_size)[None])[0]


def test_fp32_weights_are_the_checkpoints(with_memory, tmp_path):
    folder = with_memory.export(tmp_path / "hf")
    assert_weights(with_memory.run, folder)
    config = config_of(folder)
    assert (config["model_type"], config["num_memory_blocks"], config["dtype"]) == ("tide", 2, "float32")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500_000.0


def test_bf16_weights_are_the_checkpoints_rounded(with_memory, tmp_path):
    found = tensors_of(with_memory.export(tmp_path / "hf", dtype="bf16"))
    for name in ("embedding.weight", "layers.1.router.weight"):
        assert torch.equal(found[llama_name(name)], with_memory.run.weights.tensor(name).bfloat16())
    assert torch.equal(
        found["model.memory.tables.0"], with_memory.run.weights.tensor("memory.tables").bfloat16()
    )


def test_large_models_are_cut_into_files_and_tables_by_rows(with_memory, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(weights, "CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(shards.plan_shards, "__defaults__", (40_000,))
    folder = with_memory.export(tmp_path / "hf")
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert len(sizes) > 5
    embedding = json.loads((folder / shards.INDEX_FILE).read_text())["weight_map"][
        "model.embed_tokens.weight"
    ]
    assert max(size for name, size in sizes.items() if name != embedding) < 40_000 + 4_000
    assert config_of(folder)["memory_part_rows"] == 40_000 // (2 * 32 * 4)
    assert_weights(with_memory.run, folder)


@pytest.mark.parametrize(
    ("tables", "memory"),
    [
        *(
            (tables, memory)
            for tables in ("int8", "int4", "nf4", "rank:0.5")
            for memory in ("inline", "sidecar")
        ),
        ("bf16", "sidecar"),
    ],
)
def test_records_hold_finished_rows(with_memory, tmp_path, tables, memory, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK_ELEMENTS", 1000)
    folder = with_memory.export(tmp_path / "hf", tables=tables, memory=memory)
    config, V = config_of(folder), with_memory.run.config.model.vocab_size
    row_format = RowFormat(config["memory_format"], 2, 32, config["memory_rank"])
    if memory == "inline":
        found = tensors_of(folder)
        basis = found.get("model.memory.basis")
        rows = row_format.decode(
            found["model.memory.records_0"], torch.float32, None if basis is None else basis.float()
        )
        assert config["memory_file"] is None
    else:
        assert not [name for name in tensors_of(folder) if "memory" in name]
        store = open_store(
            folder / config["memory_file"], row_format, rows=V, fingerprint=config["memory_fingerprint"]
        )
        rows = store.rows(torch.arange(V), torch.float32)
        store.close()
    wanted = memory_of(with_memory.run)
    error = float((rows - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt())
    assert error < {"int8": 0.01, "int4": 0.1, "nf4": 0.11, "bf16": 0.003, "rank:0.5": 0.8}[tables]
    if tables != "rank:0.5":  # nothing is lost twice: what is stored is the rounded row itself
        assert torch.equal(rows, row_format.decode(row_format.encode(wanted), torch.float32))


def test_without_memory_it_is_a_stock_llama_folder(tiny_data, tmp_path):
    run = random_run(tiny_data, tmp_path, *WITHOUT_MEMORY)
    folder = run.export(tmp_path / "hf")
    assert_weights(run.run, folder)
    assert config_of(folder)["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config_of(folder)
    assert not list(folder.glob("*.py"))
    assert "trust_remote_code" not in (folder / "README.md").read_text()
    for words in ({"tables": "int8"}, {"memory": "sidecar"}):
        with pytest.raises(ConfigError, match="is for a memory, and the run has K = 0: leave it out"):
            run.export(tmp_path / "other", **words)


def test_the_card_says_what_the_model_is(tiny_runs, tmp_path):
    options = ExportOptions(
        run=str(tiny_runs[2]), out=str(tmp_path / "hf"), tables="int4", license="apache-2.0", name="Tiny TIDE"
    )
    export(options, progress=False)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith('---\nlicense: "apache-2.0"\nlibrary_name: "transformers"\n')
    for said in (
        "# Tiny TIDE",
        "| K | 2 |",
        "| Optimizer steps | 6 |",
        "| Training tokens | 1,536 |",
        "2605.06216",
    ):
        assert said in card
    assert "At step 6" in card and "| decile 10 |" in card and "trust_remote_code=True" in card
    assert "normalised, rows in int4, a bf16 scale for 32 elements, among the weights" in card


def test_a_step_is_chosen_or_those_there_are_named(tiny_runs, tmp_path):
    export(ExportOptions(run=str(tiny_runs[2]), out=str(tmp_path / "hf"), step=3), progress=False)
    assert json.loads((tmp_path / "hf" / "export.json").read_text())["step"] == 3
    assert "At step 3" in (tmp_path / "hf" / "README.md").read_text()
    with pytest.raises(ConfigError, match=r"step=5 has no checkpoint in .*: those there are of step 3, 6\."):
        export(ExportOptions(run=str(tiny_runs[2]), out=str(tmp_path / "x"), step=5), progress=False)


def test_data_that_moved_is_found_and_its_text_is_not_needed(with_memory, tiny_data, tmp_path):
    moved = shutil.copytree(tiny_data, tmp_path / "data", ignore=shutil.ignore_patterns("*.tar"))
    run = shutil.copytree(with_memory.folder, tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny_data), str(tmp_path / "gone")))
    options = ExportOptions(run=str(run), out=str(tmp_path / "hf"))
    with pytest.raises(ConfigError, match=r"is not there: say where it lies with data=<folder>\."):
        export(options, progress=False)
    export(dataclasses.replace(options, data=str(moved)), progress=False)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_a_diverged_memory_is_named(tiny_data, tmp_path, monkeypatch):
    run = random_run(tiny_data, tmp_path)
    plain = weights._rows

    def with_nan(stored, name, first, last):
        for rows in plain(stored, name, first, last):
            if name == "memory.tables":
                rows[5, 1, 3] = float("nan")
            yield rows

    monkeypatch.setattr(weights, "_rows", with_nan)
    with pytest.raises(CheckpointError, match=r"row 5 of memory block 1 is not finite"):
        run.export(tmp_path / "hf", tables="int8")
    assert not (tmp_path / "hf").exists() and not (tmp_path / "hf.partial").exists()


WITH_LITTLE_DISK = """
import resource, sys
from tide_mega.export.__main__ import main
from tide_mega.config.command_line import tool_entry
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
tool_entry(lambda: main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["inline", "sidecar"])
def test_a_disk_that_takes_no_more_is_a_sentence_and_leaves_nothing(with_memory, tmp_path, memory):
    words = [f"run={with_memory.folder}", f"out={tmp_path / 'hf'}", f"memory={memory}", "tables=bf16"]
    code = WITH_LITTLE_DISK.format(limit=60_000)
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert (
        "File too large" in ended.stderr and "nothing of" in ended.stderr and "Traceback" not in ended.stderr
    )
    assert not list(tmp_path.glob("hf*"))


WRITING_SLOWLY = """
import runpy, time
from tide_mega.export import weights

def slow(*args):
    print("writing", flush=True)
    time.sleep(60)
    yield

weights._rows = slow
runpy.run_module("tide_mega.export", run_name="__main__")
"""


@pytest.mark.slow
def test_asked_to_end_it_leaves_nothing(with_memory, tmp_path):
    words = [f"run={with_memory.folder}", f"out={tmp_path / 'hf'}"]
    with subprocess.Popen(
        [sys.executable, "-c", WRITING_SLOWLY, *words], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while "writing" not in process.stdout.readline():
            assert process.poll() is None
        assert (tmp_path / "hf.partial").is_dir()
        process.terminate()
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("hf*"))


def test_the_command_says_where_and_how_much(with_memory, tmp_path, capsys):
    assert main([f"run={with_memory.folder}", f"out={tmp_path / 'hf'}"]) == 0
    said = capsys.readouterr()
    assert "random: K = 2, step 7, 1,792 training tokens" in said.out
    assert f"{tmp_path / 'hf'}: 0.00 GB" in said.out
    assert "exporting: 100%" in said.err


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["tp2 dp2 owners", "pp2 dp2 owners", "pp2 vpp2"])
def test_a_checkpoint_of_any_topology(topology, pools, tiny_data, tmp_path):
    config = config_at(topology, tiny_data, tmp_path, "memory.router_init_std=0.5")
    pools(2 if topology == "pp2 vpp2" else 4).run(train_here, config)
    run = RandomRun(tmp_path / "tiny")
    assert_weights(run.run, run.export(tmp_path / "hf"))


@pytest.mark.slow
def test_memory_stays_small_whatever_the_model(tiny_data, tmp_path):
    """A model of 300 MB is exported by a process that grows by less than a third of it."""
    words = ("model.hidden_size=256", "model.vocab_size=65536", "memory=k2", "memory.num_blocks=4")
    run = random_run(tiny_data, tmp_path, *words)
    code = (
        "import resource, sys; from tide_mega.export.export import export; "
        "from tide_mega.export.options import ExportOptions\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024; before = peak()\n"
        "export(ExportOptions(run=sys.argv[1], out=sys.argv[2], dtype='fp32'), progress=False)\n"
        "print(peak() - before)"
    )
    words = [sys.executable, "-c", code, str(run.folder), str(tmp_path / "hf")]
    grew = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])
    size = sum(path.stat().st_size for path in (tmp_path / "hf").iterdir())
    assert size > 300e6 and grew < 200, (size, grew)
