import json

from tide_mega.jobs.slurm import SlurmJob
from tide_mega.run.folder import add_start, keep_config, read_starts

ENVIRONMENT = {"world_size": 8, "git": {"commit": "abc", "dirty": False}, "python": "3.11"}


def test_every_start_is_listed_and_the_latest_environment_stands_above(tmp_path):
    path = tmp_path / "environment.json"
    job = SlurmJob("17", 1, 2, None)
    assert add_start(path, ENVIRONMENT, code="abc", config="starts/config-0001.yaml", job=None) == 1
    later = ENVIRONMENT | {"python": "3.12", "world_size": 16}
    assert add_start(path, later, code=None, config="starts/config-0001.yaml", job=job) == 2
    content = json.loads(path.read_text())
    assert content["python"] == "3.12"
    first, second = content["starts"]
    assert (first["job"], first["world_size"], first["code"], first["git"]["commit"]) == (
        None,
        8,
        "abc",
        "abc",
    )
    assert (second["job"], second["restart"], second["nodes"], second["world_size"]) == ("17", 1, 2, 16)
    assert first["time"] <= second["time"] and first["time"].endswith("+00:00")


def test_an_unreadable_history_begins_anew_and_says_so(tmp_path, caplog):
    path = tmp_path / "environment.json"
    path.write_text('{"python": "3.11"}')
    assert read_starts(path) == []
    assert "begins anew" in caplog.text


def test_configurations_that_differ_are_kept_apart(tmp_path):
    folder = tmp_path / "starts"
    names = [keep_config(folder, text, tmp_path) for text in ("a", "a", "b", "a")]
    assert names == [f"starts/config-000{n}.yaml" for n in (1, 1, 2, 1)]
    assert (folder / "config-0002.yaml").read_text() == "b"


def test_slurms_variables_are_read():
    environment = {
        "SLURM_JOB_ID": "9",
        "SLURM_RESTART_COUNT": "2",
        "SLURM_JOB_NUM_NODES": "4",
        "SLURM_JOB_END_TIME": "1700000000",
    }
    assert SlurmJob.from_environment(environment) == SlurmJob("9", 2, 4, 1_700_000_000.0)
    array = environment | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert SlurmJob.from_environment(array).id == "7_3"
    assert SlurmJob.from_environment({"SLURM_JOB_ID": "9", "SLURM_JOB_END_TIME": ""}).end_time is None
    assert SlurmJob.from_environment({}) is None
