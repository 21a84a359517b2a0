"""The sbatch script under a real Slurm of two nodes on this machine: trains, is told that time is up, goes on."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.data import ROOT
from tests.helpers.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
# cred_expire: a requeued job starts after it
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerParameters=sched_interval=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


class Slurm:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def call(self, *command: object) -> str:
        done = subprocess.run(list(map(str, command)), env=self.environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> dict[str, str]:
        words = self.call("scontrol", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid():
        pytest.skip(f"needs root and Debian's slurmctld, slurmd, slurm-client and munge; missing: {missing}")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    folder.chmod(0o755)
    ports = [free_port() for _ in range(3)]
    (folder / "slurm.conf").write_text(CONF.format(host=socket.gethostname().split(".")[0], ports=ports, folder=folder))
    made = Slurm(folder)
    files = [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    daemons = [
        ["munged", "-F", "-f", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket", *files],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]
    running = []
    try:
        with (folder / "daemons.log").open("w") as log:
            for daemon in daemons:
                running.append(subprocess.Popen(daemon, env=made.environment, stdout=log, stderr=log))
                time.sleep(1)
        for _ in range(30):
            if (
                subprocess.run(["sinfo", "-ht", "idle", "-o%D"], env=made.environment, capture_output=True).stdout
                == b"2\n"
            ):
                break
            time.sleep(1)
        else:
            pytest.fail((folder / "daemons.log").read_text()[-3000:])
        yield made
    finally:
        subprocess.run(["scancel", "--user=root"], env=made.environment, capture_output=True)
        for _ in range(60):  # until the jobs' processes are gone
            if not subprocess.run(["squeue", "-h"], env=made.environment, capture_output=True).stdout:
                break
            time.sleep(1)
        for process in reversed(running):
            process.terminate()
        for process in running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_job_that_runs_out_of_time_is_requeued_and_finishes(
    slurm: Slurm, digits_folder: Path, ae_file: Path, tmp_path: Path
) -> None:
    slurm.environment["SCRATCH"] = str(tmp_path / "scratch")
    log = tmp_path / "log"
    flags = ["--nodes=2", "--cpus-per-task=1", "--gres=none", "--time=10", f"--chdir={tmp_path}", f"--output={log}"]
    train = ["--dataset", digits_folder, "--ae-ckpt", ae_file, "--epochs", 25, "--batch-size", 8, "--T", 50]
    train += ["--num-workers", 2, "--hidden-dim", 32, "--device", "cpu", "--checkpoint-every", 5]
    submitted = slurm.call("sbatch", "--parsable", *flags, "deploy/slurm/ldm_ray.sbatch", *train)

    def wait_for(pattern: str) -> Path:
        for _ in range(600):
            found = list(tmp_path.glob(f"scratch/checkpoints/latent-diffusion-*/{pattern}"))
            if found:
                return found[0]
            assert slurm.state(submitted)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), (
                log.read_text()
            )
            time.sleep(0.5)
        pytest.fail(log.read_text())

    latest = wait_for("checkpoint_epoch_000005.pt").with_name("latest.pt")
    slurm.call("scancel", "--batch", "--signal=USR1", submitted)  # what --signal=B:USR1@120 does near the limit
    wait_for("checkpoint_epoch_000025.pt")
    for _ in range(60):
        state = slurm.state(submitted)
        if state["JobState"] == "COMPLETED":
            break
        time.sleep(0.5)
    told = log.read_text()
    assert state["JobState"] == "COMPLETED" and state["Restarts"] == "1", (state, told)
    assert "time is nearly up: saving" in told and f"requeueing job {submitted}" in told
    assert told.count("Ray on n1 n2") == 2 and "going on with latent-diffusion" in told
    assert torch.load(latest, weights_only=True)["epoch"] == 25
