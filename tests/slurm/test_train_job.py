"""The real training job through a real `sbatch`, on one node and on two."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tide_mega.config.hydra_door import from_yaml

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A few modules of the standard library, tokenised with a BPE of 512."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "text").mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("[a-d]*.py")):
        (folder / "text" / f"{path.stem}.txt").write_bytes(path.read_bytes())
    words = [f"inputs=[{folder}/text]", f"out={folder}/data", "tokenizer=bpe:512", "validation_fraction=0.2"]
    command = [sys.executable, "tools/prepare_data.py", *words, "workers=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "data"


def overrides(dataset, runs):
    return [
        *(f"data.path={dataset}", f"run.root={runs}", "memory=k2", "optim.lr=3e-4", "optim.warmup_steps=1"),
        *("model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=128", "model.vocab_size=512"),
        *("data.seq_length=64", "data.num_workers=0", "trainer.max_steps=3", "trainer.global_batch_size=4"),
        *(
            "trainer.micro_batch_size=1",
            "trainer.eval_every=0",
            "trainer.eval_sequences=4",
            "logging.every=1",
        ),
        "cluster.threads=1",
    ]


@pytest.mark.parametrize(
    "shape", [("--nodes=1", "--ntasks-per-node=2"), ("--nodes=2", "--ntasks-per-node=1")]
)
def test_sbatch_trains_with_the_overrides_given(cluster, dataset, tmp_path, shape):
    submitted = cluster.run(
        *("sbatch", "--parsable", "--gpus-per-node=0", f"--output={tmp_path}/job.log", *shape),
        *("slurm/tide_1b.sh", *overrides(dataset, tmp_path / "runs")),
        TIDE_VENV=sys.prefix,
        TIDE_RUN_NAME="job",
    )
    assert submitted.returncode == 0, submitted.stderr
    fields = cluster.finish(submitted.stdout.strip(), timeout=300)
    log = (tmp_path / "job.log").read_text()
    assert fields["JobState"] == "COMPLETED", log
    run = tmp_path / "runs" / "job"
    config = from_yaml((run / "config.yaml").read_text())
    assert (config.experiment, config.memory.num_blocks, config.optim.lr) == ("demo_tide", 2, 3e-4)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3]
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
