"""A private SLURM cluster of two nodes on this host: its own munge key, sockets, ports and state folder.

Its queue is strict: no job without a time limit, none above a day, little memory where none is asked for.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerNode=100
JobSubmitPlugins=require_timelimit
EnforcePartLimits=ALL
ReturnToService=2
MinJobAge=86400
JobRequeue=1
KillWait=5
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=2000 State=UNKNOWN
{node_lines}
PartitionName=main Nodes=node[1-{nodes}] Default=YES MaxTime=1-00:00:00 State=UP
"""


@dataclass
class Cluster:
    """Commands against the private cluster."""

    folder: Path
    config: Path

    def run(self, *command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "TIDE_"))}
        environment = inherited | {"SLURM_CONF": str(self.config)} | environment
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

    def finish(self, job: str, timeout: float, restarts: int = 0) -> dict[str, str]:
        """Wait until the job has ended, for the `restarts`-th time after its first; its fields."""
        deadline, ended_at = time.monotonic() + timeout, None
        while True:
            fields = self.fields(job)
            ended = fields.get("JobState") in {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
            if ended and int(fields["Restarts"]) >= restarts:
                return fields
            ended_at = (ended_at or time.monotonic()) if ended else None
            if ended_at is not None and time.monotonic() > ended_at + 20:
                pytest.fail(f"job {job} ended for good, restarts={fields['Restarts']}:\n{fields}")
            if time.monotonic() > deadline:
                self.run("scancel", job)
                pytest.fail(f"job {job} did not end within {timeout:.0f} s:\n{fields}\n{self.logs()}")
            time.sleep(0.2)

    def fields(self, job: str) -> dict[str, str]:
        """What scontrol shows of the job now."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in sorted(self.folder.glob("*.log")))


def wait_until(reached: Callable[[], bool], what: str, logs: Callable[[], str], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {timeout} s\n{logs()}")
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextmanager
def start_cluster(folder: Path, *, nodes: int, cpus: int, gpus: int) -> Iterator[Cluster]:
    """Bring up `nodes` nodes, each with `cpus` cores and `gpus` pretended GPUs; all on this host."""
    for daemon in DAEMONS:
        if shutil.which(daemon, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            pytest.skip(f"{daemon} is not installed (apt-get install slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("bringing up a SLURM cluster needs root")
    names = [f"node{number + 1}" for number in range(nodes)]
    for name in ("munge", "state", *(f"spool/{name}" for name in names)):
        (folder / name).mkdir(parents=True, mode=0o700)
    (folder / "munge").chmod(0o711)
    config = folder / "slurm.conf"
    host, ports = socket.gethostname().split(".")[0], free_ports(1 + nodes)
    gres = f" Gres=gpu:{gpus}" if gpus else ""
    node_lines = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}{gres}"
        for name, port in zip(names, ports[1:], strict=True)
    ]
    config.write_text(
        CONFIG.format(
            host=host, folder=folder, ports=ports, nodes=nodes, cpus=cpus, node_lines="\n".join(node_lines)
        )
    )
    if gpus:  # character devices pass for GPUs, plain files do not
        files = f"/dev/tty[0-{gpus - 1}]"
        (folder / "gres.conf").write_text(f"NodeName=node[1-{nodes}] Name=gpu File={files}\n")
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    here = Cluster(folder, config)
    started: list[subprocess.Popen] = []

    def start(*command):
        log = (folder / f"{Path(command[0]).name}-{len(started)}.log").open("w")
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"SLURM_CONF": str(config)}
        )
        started.append(process)

    try:
        munge = folder / "munge"
        start(
            *("/usr/sbin/munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}"),
            *(f"--socket={munge}/socket", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed"),
            f"--log-file={munge}/log",
        )
        wait_until((munge / "socket").exists, "munged's socket", here.logs)
        start("/usr/sbin/slurmctld", "-D", "-f", str(config))
        for name in names:
            start("/usr/sbin/slurmd", "-D", "-f", str(config), "-N", name)
        wait_until(
            lambda: here.run("sinfo", "-h", "-o", "%D %t").stdout.strip() == f"{nodes} idle",
            f"{nodes} idle nodes",
            here.logs,
        )
        yield here
    finally:
        try:
            here.run("scancel", "--state=RUNNING,PENDING", "--user=root")
            wait_until(lambda: not here.run("squeue", "-h").stdout.strip(), "an empty queue", here.logs)
        finally:
            for process in reversed(started):
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(timeout=15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two nodes of four cores (there may be fewer in this host), without GPUs."""
    with start_cluster(tmp_path_factory.mktemp("slurm"), nodes=2, cpus=4, gpus=0) as here:
        yield here
