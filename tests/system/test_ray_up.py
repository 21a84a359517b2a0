"""``ray up deploy/local.yaml`` for real: two hosts made of network namespaces on this machine, with an sshd each."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.helpers.data import ROOT

PROGRAMS = ("ip", "sshd", "ssh", "ssh-keygen", "rsync", "unshare")
BRIDGE, NET = "ldm-br", "10.213.77"
HOSTS = {"ldm-h1": f"{NET}.11", "ldm-h2": f"{NET}.12"}


def sh(*command: object, ok: bool = True) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0 or not ok, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def path_of(program: str) -> str | None:
    return shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin")


def remove_network() -> None:
    for number, name in enumerate(HOSTS, 1):
        sh("ip", "link", "del", f"ldm-v{number}", ok=False)
        sh("ip", "netns", "del", name, ok=False)
    sh("ip", "link", "del", BRIDGE, ok=False)


@dataclass(frozen=True)
class Hosts:
    """base: a folder that all see; everything of a host's own (home, /tmp) is below it."""

    base: Path

    def processes(self, name: str) -> list[str]:
        """Command lines in a host."""
        found = []
        for pid in sh("ip", "netns", "pids", name).split():
            with contextlib.suppress(OSError):
                found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    missing = [name for name in PROGRAMS if path_of(name) is None]
    if missing or os.geteuid():
        pytest.skip(f"needs root, openssh-server, iproute2 and rsync; missing: {missing}")
    if any(path.is_relative_to("/tmp") for path in (Path(sys.prefix), Path(__file__).resolve())):
        pytest.skip("the project or its environment lies below /tmp, which each of the hosts has to itself")
    remove_network()
    probe = subprocess.run(["ip", "netns", "add", next(iter(HOSTS))], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"needs to make network namespaces: {probe.stderr.strip()}")
    remove_network()
    base = Path(tempfile.mkdtemp(prefix="ldm", dir="/var/tmp"))  # not below /tmp, which each host has to itself
    running: list[subprocess.Popen[bytes]] = []
    try:
        sh("ip", "link", "add", BRIDGE, "type", "bridge")
        sh("ip", "addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        sh("ip", "link", "set", BRIDGE, "up")
        for key in ("key", "hostkey"):
            sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", base / key)
        Path("/run/sshd").mkdir(exist_ok=True)
        for number, (name, address) in enumerate(HOSTS.items(), 1):
            sh("ip", "netns", "add", name)
            sh("ip", "link", "add", f"ldm-v{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            sh("ip", "link", "set", f"ldm-v{number}", "master", BRIDGE, "up")
            sh("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                sh("ip", "-n", name, "link", "set", device, "up")
            sh("ip", "-n", name, "route", "add", "default", "via", f"{NET}.1")  # by it Ray finds its own address
            # processes of its own too, for `ray stop` ends whatever Ray it sees
            spaces = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
            running.append(subprocess.Popen(["ip", "netns", "exec", name, *spaces, "sh", "-c", boot(base, name)]))
        for address in HOSTS.values():
            wait_for_ssh(base, address)
        yield Hosts(base)
    finally:
        for name in HOSTS:
            for pid in sh("ip", "netns", "pids", name, ok=False).split():
                sh("kill", "-9", pid, ok=False)
        for process in running:
            process.kill()
            process.wait()
        remove_network()
        shutil.rmtree(base, ignore_errors=True)


def boot(base: Path, name: str) -> str:
    """The shell script of a host: its own /tmp, its own home for root, and sshd."""
    own = base / name
    for part in ("tmp", "home"):
        (own / part).mkdir(parents=True)
    lines = Path("/etc/passwd").read_text().splitlines()
    fields = [line.split(":") for line in lines]
    fields = [[*f[:5], str(own / "home"), "/bin/bash"] if f[0] == "root" else f for f in fields]
    (own / "passwd").write_text("".join(":".join(f) + "\n" for f in fields))
    (own / "tmp").chmod(0o1777)
    # a host's name stands for its address, or the workers' collectives (gloo) do not find each other
    (own / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in HOSTS.items()))
    options = f"-o HostKey={base}/hostkey -o AuthorizedKeysFile={base}/key.pub -o StrictModes=no -o UsePAM=no"
    return (
        f"hostname {name} && mount --bind {own}/hosts /etc/hosts && "
        f"mount --bind {own}/passwd /etc/passwd && mount --bind {own}/tmp /tmp && "
        f"exec {path_of('sshd')} -D -f /dev/null -o PidFile=none {options}"
    )


def wait_for_ssh(base: Path, address: str) -> None:
    options = ["-i", str(base / "key"), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    for _ in range(60):
        done = subprocess.run(["ssh", *options, f"root@{address}", "true"], capture_output=True, text=True)
        if done.returncode == 0:
            return
        time.sleep(0.5)
    if "not permitted" in done.stderr.lower():
        pytest.skip(f"ssh into a namespace: {done.stderr}")
    pytest.fail(f"no ssh to {address}: {done.stderr}")


def config_of(base: Path) -> dict[str, Any]:
    """deploy/local.yaml with these hosts, and this Python in place of one that pip fills."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "local.yaml").read_text(encoding="utf-8"))
    head, *workers = HOSTS.values()
    config["cluster_name"] = f"ldm-{secrets.token_hex(4)}"
    config["provider"] |= {"head_ip": head, "worker_ips": workers}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(base / "key")}
    (base / "token").write_text(secrets.token_hex(32))
    mounts = config["file_mounts"]
    mounts |= {remote: str(ROOT / local) for remote, local in mounts.items()}
    mounts["~/.ray/auth_token"] = str(base / "token")
    environment = config["setup_commands"][-1].replace("SCRATCH=/shared", f"SCRATCH={base}/shared")
    config["setup_commands"] = [f"cd ~/ldm_ray && ln -sfn {Path(sys.prefix)} .venv", environment]
    for which in ("head_start_ray_commands", "worker_start_ray_commands"):
        # two CPUs each, so that two workers of two threads need both hosts
        config[which] = [line.replace("ray start", "ray start --num-cpus=2") for line in config[which]]
    return config


STEPS = """
set -euo pipefail
cd ~/ldm_ray
python - <<'PYTHON'
import time, ray
ray.init(logging_level="ERROR")
for _ in range(300):
    hosts = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(hosts) == 2:
        break
    time.sleep(1)
print("HOSTS", *sorted(hosts))
PYTHON
python -m ldm_ray.train --dataset BASE/shared/digits --ae-ckpt BASE/shared/ae.pt --epochs 2 --T 50 --hidden-dim 32 \
    --num-workers 2 --encode-workers 2 --device cpu
python -m ldm_ray.generate --seeds 0-99 --shard-size 25 --outdir BASE/shared/set --device cpu \
    --ckpt BASE/shared/checkpoints/latent-diffusion-*/latest.pt
serve run serve.app:deployment device=cpu replicas=2 token=secret >BASE/shared/serve.log 2>&1 &
serve=$!
python - <<'PYTHON'
import time, urllib.error, urllib.request
def ask(path, token=None):
    headers = {"Authorization": f"Bearer {token}", "Accept": "application/x-npy"} if token else {}
    data = b'{"prompt": "seven", "n": 3, "seed": 5}' if path.startswith("/v1") else None
    headers["Content-Type"] = "application/json"
    request = urllib.request.Request("http://127.0.0.1:8000" + path, data, headers)
    return urllib.request.urlopen(request, timeout=60)
for _ in range(240):
    try:
        if ask("/ready").status == 200:
            break
    except OSError:
        time.sleep(1)
open("BASE/shared/served.npy", "wb").write(ask("/v1/images/generations", "secret").read())
try:
    ask("/v1/images/generations")
except urllib.error.HTTPError as error:
    print("WITHOUT TOKEN", error.code)
PYTHON
kill "$serve"
echo DONE
"""


def test_up_train_generate_serve_down(hosts: Hosts, digits_folder: Path, ae_file: Path) -> None:
    base, file = hosts.base, hosts.base / "cluster.yaml"
    shutil.copytree(digits_folder, base / "shared" / "digits")
    shutil.copy(ae_file, base / "shared" / "ae.pt")
    (base / "steps.sh").write_text(STEPS.replace("BASE", str(base)))
    file.write_text(yaml.safe_dump(config_of(base)))
    ray = str(Path(sys.executable).with_name("ray"))

    def call(*words: str, timeout: float = 420) -> str:
        done = subprocess.run(
            [ray, *words], capture_output=True, text=True, timeout=timeout, cwd=ROOT, stdin=subprocess.DEVNULL
        )
        errors = [file.read_text()[-3000:] for file in base.glob("shared/runs/*/error.txt")]
        assert done.returncode == 0, "\n".join([done.stdout[-4000:], done.stderr[-2000:], *errors])
        return done.stdout

    call("up", "-y", "--no-config-cache", str(file))
    try:
        told = call("exec", str(file), f"bash {base}/steps.sh")
        assert f"HOSTS {' '.join(HOSTS.values())}" in told, told
        assert "WITHOUT TOKEN 401" in told and "DONE" in told, told + (base / "shared" / "serve.log").read_text()
        [metrics] = base.glob("shared/runs/latent-diffusion-*/metrics.jsonl")
        assert [json.loads(line)["workers"] for line in metrics.read_text().splitlines()] == [2, 2]
        assert len(list(base.glob("shared/set/data/*.parquet"))) == 4
        assert np.load(base / "shared" / "served.npy").shape[0] == 3
        for name in HOSTS:
            assert any("raylet" in line for line in hosts.processes(name))
    finally:
        call("down", "-y", str(file))
    for _ in range(120):  # the workers end when they have missed the head for a minute
        left = [line for name in HOSTS for line in hosts.processes(name) if "raylet" in line or "gcs_server" in line]
        if not left:
            break
        time.sleep(1)
    assert not left
