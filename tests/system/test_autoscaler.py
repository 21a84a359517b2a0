"""A cluster that begins without workers: they come for the work and go after it.

Ray's autoscaler with its provider of pretended nodes, which are real raylets on this machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.clusters import Head, running

PROVIDER = {  # what Ray's own example of it sets
    "type": "fake_multinode",
    "use_node_id_as_ip": True,
    "disable_node_updaters": True,
    "disable_launch_config_check": True,
    "foreground_node_launch": True,
}
LISTS = ["initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"]
LISTS += ["head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude"]
LISTS += ["rsync_filter"]
WATCH = """
import ray, sys, time
ray.init(address="auto", log_to_driver=False)
while True:
    print(sum(node["Alive"] for node in ray.nodes()), flush=True)
    time.sleep(0.5)
"""


def scaling(address: str) -> dict:
    """A head without cores, and up to two workers of one core that are given up after 6 s without work."""
    kinds = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    return {
        "cluster_name": "pretended",
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 100.0,
        "provider": PROVIDER | {"gcs_address": address},
        "available_node_types": kinds,
        "head_node_type": "ray.head.default",
        **{name: [] for name in LISTS},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        "file_mounts_sync_continuously": False,
    }


def test_workers_come_for_the_work_and_go_after_it(digits_folder: Path, tmp_path: Path) -> None:
    head, config = Head(RAY_FAKE_CLUSTER="1", AUTOSCALER_UPDATE_INTERVAL_S="1"), tmp_path / "scaling.json"
    config.write_text(json.dumps(scaling(head.address)))
    with running(head, f"--autoscaling-config={config}"):
        watched = tmp_path / "watched"
        with watched.open("w") as stream:
            watcher = subprocess.Popen([sys.executable, "-c", WATCH], env=head.environment, stdout=stream)
        try:
            flags = ["--dataset", digits_folder, "--outdir", tmp_path / "out", "--epochs", 1, "--device", "cpu"]
            done = head.command("-m", "ldm_ray.train_autoencoder", *flags, LDM_RAY_CPUS="1")
            assert done.returncode == 0, done.stderr
            assert list((tmp_path / "out").rglob("latest.pt"))
            until = time.monotonic() + 90
            while (counts := watched.read_text().split())[-1:] != ["1"]:
                assert time.monotonic() < until, counts
                assert watcher.poll() is None
                time.sleep(0.5)
        finally:
            watcher.kill()
            watcher.wait()
    assert counts[0] == "1", counts  # none before there was work
    assert max(map(int, counts)) > 1, counts
