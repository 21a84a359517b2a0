"""cluster.yaml is a config that Ray's autoscaler accepts, and matches the project's pins."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cluster() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    return config


def test_autoscaler_accepts_it(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_a_misspelled_key_is_refused(cluster: dict[str, Any]) -> None:
    cluster["idle_timeout_minuts"] = 5
    with pytest.raises(Exception, match="idle_timeout_minuts"):
        validate_config(prepare_config(cluster))


def test_head_runs_no_work_and_workers_have_a_gpu(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    types = prepared["available_node_types"]
    head = types.pop(prepared["head_node_type"])
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert types
    for worker in types.values():
        assert worker["resources"]["GPU"] >= 1
        assert worker["min_workers"] == 0
        assert worker["max_workers"] <= prepared["max_workers"]
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_mounted_files_exist(cluster: dict[str, Any]) -> None:
    for local in cluster["file_mounts"].values():
        assert (ROOT / local).exists(), local


def test_image_has_the_pinned_ray(cluster: dict[str, Any]) -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
        if line.startswith("ray==")
    )
    assert cluster["docker"]["image"].startswith(f"rayproject/ray:{pins['ray']}-")


def test_ray_is_not_open_to_the_world_and_reports_nothing(cluster: dict[str, Any]) -> None:
    [head] = [c for c in cluster["head_start_ray_commands"] if "ray start" in c]
    [worker] = [c for c in cluster["worker_start_ray_commands"] if "ray start" in c]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--disable-usage-stats" in head
    assert "--disable-usage-stats" in worker
