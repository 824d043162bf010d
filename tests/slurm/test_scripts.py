"""The job scripts as text, and what wraps each process: neither needs a SLURM."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "slurm").glob("*.sh") if "_" in path.stem)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_names_an_experiment_that_exists(script):
    text = script.read_text()
    experiment = next(line.split("=")[1] for line in text.splitlines() if line.startswith("EXPERIMENT="))
    assert (ROOT / "conf" / "experiment" / f"{experiment}.yaml").is_file()
    assert f"--job-name={script.stem}" in text and f"sbatch slurm/{script.name} " in text
    assert os.access(script, os.X_OK)


def test_the_scripts_differ_in_title_size_and_experiment_alone():
    titles = re.compile(r"^# .+?\. (Overrides follow the script: sbatch slurm/)\w+\.sh .+$", flags=re.M)
    own = re.compile(r"^(#SBATCH --job-name=|#SBATCH --nodes=|EXPERIMENT=)\w+$", flags=re.M)
    common = {own.sub(r"\1", titles.sub(r"# \1", script.read_text())) for script in SCRIPTS}
    assert len(SCRIPTS) == 13 and len(common) == 1
    asked = re.findall(r"^#SBATCH (--.+)$", common.pop(), flags=re.M)
    for option in ("--exclusive", "--mem=0", "--time=24:00:00", "--requeue", "--open-mode=append"):
        assert option in asked
    assert "--signal=B:USR1@300" in asked


SHOW = """\
#!{python}
import json, os, sys
print(json.dumps(dict(os.environ, argv=sys.argv[1:])))
"""


@pytest.fixture
def task(tmp_path):
    """Run slurm/task.sh with a Python that shows its environment."""
    shown = tmp_path / "python"
    shown.write_text(SHOW.format(python=sys.executable))
    shown.chmod(0o755)
    (tmp_path / "local").mkdir()

    def run(**environment):
        names = {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16"}
        names |= {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "TIDE_PYTHON": str(shown)}
        names |= {"TMPDIR": str(tmp_path / "local"), "PATH": os.environ["PATH"]} | environment
        words = ["bash", str(ROOT / "slurm" / "task.sh"), "tide_mega.train", "a=b c"]
        done = subprocess.run(words, env=names, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_ranks_are_named_as_torch_reads_them(task):
    seen = task()
    assert [seen[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == [
        *("9", "1", "16", "8")
    ]
    assert seen["argv"] == ["-m", "tide_mega.train", "a=b c"]


def caches(seen):
    return [Path(seen[name]) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")]


def test_compiled_kernels_stay_on_the_node_s_disk_for_the_next_job(task, tmp_path):
    first = caches(task())
    folder = tmp_path / "local" / f"tide-mega-{os.getuid()}"
    assert first == [folder / "triton", folder / "inductor"] == caches(task())
    assert folder.stat().st_mode & 0o777 == 0o700


def fake_stat(folder, script):
    """A PATH on which `stat` is a script."""
    folder.mkdir()
    (folder / "stat").write_text(f"#!/bin/bash\n{script}\n")
    (folder / "stat").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_shared_or_foreign_folder_holds_no_cache(task, tmp_path):
    own, in_tmp = f"tide-mega-{os.getuid()}", Path("/tmp") / f"tide-mega-{os.getuid()}"
    shared = fake_stat(tmp_path / "bin", 'case "${@: -1}" in "$TMPDIR"/*) echo lustre ;; *) echo xfs ;; esac')
    assert {cache.parent for cache in caches(task(PATH=shared))} == {in_tmp}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "local" / own).rmdir()
    (tmp_path / "local" / own).symlink_to(tmp_path / "elsewhere")
    assert {cache.parent for cache in caches(task())} == {in_tmp}


def test_a_cache_that_others_could_have_filled_is_not_used(task, tmp_path):
    own = tmp_path / "local" / f"tide-mega-{os.getuid()}"
    in_tmp = Path("/tmp") / own.name
    own.mkdir()
    own.chmod(0o755)
    assert {cache.parent for cache in caches(task())} == {own}
    assert own.stat().st_mode & 0o777 == 0o700
    for mode in (0o770, 0o702):
        own.chmod(mode)
        assert {cache.parent for cache in caches(task())} == {in_tmp}
        assert own.stat().st_mode & 0o777 == mode
    own.chmod(0o700)
    own.parent.chmod(0o777)
    assert {cache.parent for cache in caches(task())} == {in_tmp}
    own.parent.chmod(0o1777)
    assert {cache.parent for cache in caches(task())} == {own}


def test_without_a_local_disk_each_process_has_a_cache_of_its_own(task, tmp_path):
    path = fake_stat(tmp_path / "bin", "echo nfs")
    parents = {cache.parent for _ in range(2) for cache in caches(task(PATH=path))}
    assert len(parents) == 2 and all(parent.parent == tmp_path / "local" for parent in parents)


def test_caches_that_are_given_are_kept(task):
    assert caches(task(TRITON_CACHE_DIR="/a", TORCHINDUCTOR_CACHE_DIR="/b")) == [Path("/a"), Path("/b")]
