import pytest

from tide_mega.config.sweep import adopt_ranks

JOB = {
    "SUBMITIT_EXECUTOR": "slurm",
    "SLURM_JOB_NODELIST": "a,b",
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
}


def test_a_submitit_job_gets_its_ranks():
    environment = dict(JOB)
    adopt_ranks(environment)
    assert {name: environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
    }
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("a", "20007")
    assert "GLOO_SOCKET_IFNAME" not in environment


def test_on_one_node_the_ranks_meet_on_the_loopback_and_a_restart_changes_the_port():
    environment = JOB | {"SLURM_JOB_NODELIST": "a", "SLURM_RESTART_COUNT": "2"}
    adopt_ranks(environment)
    assert (environment["MASTER_ADDR"], environment["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")
    assert environment["MASTER_PORT"] == str(20_000 + 7 + 2 * 131)


@pytest.mark.parametrize("changed", [{"RANK": "0"}, {"SUBMITIT_EXECUTOR": "local"}])
def test_every_other_process_stays_as_it_is(changed):
    environment = JOB | changed
    before = dict(environment)
    adopt_ranks(environment)
    assert environment == before
