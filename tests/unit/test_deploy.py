"""The files for clusters, offline: what Ray's own schemas, the commands' own parsers and shellcheck say of them."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema
from space import SearchConfig

from ldm_ray import cli
from ldm_ray.config import TrainConfig
from ldm_ray.dataset.config import GenerateConfig
from tests.helpers.data import ROOT

LAUNCHED = ["cluster.yaml", "deploy/gcp.yaml", "deploy/local.yaml"]
CLOUDS = LAUNCHED[:2]
KUBERAY = ROOT / "deploy" / "kuberay"
SPEC = {"RayCluster": "spec", "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
PARSERS = {"ldm_ray.train": TrainConfig, "ldm_ray.generate": GenerateConfig}


def pinned(package: str) -> str:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    [version] = [line.partition("==")[2].split()[0] for line in lines if re.match(rf"{package}(\[.*\])?==", line)]
    return version


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return loaded


def starts(cluster: dict[str, Any]) -> tuple[str, str]:
    """(head's, worker's) line that starts Ray."""
    [head] = [c for c in cluster["head_start_ray_commands"] if "ray start" in c]
    [worker] = [c for c in cluster["worker_start_ray_commands"] if "ray start" in c]
    return head, worker


def check_command(words: list[str]) -> None:
    """Parses a command of the project as it does itself. ConfigError or SystemExit on what it refuses."""
    assert words[0] == "python"
    if words[1] == "-m":
        kind, rest = PARSERS[words[2]], words[3:]
        assert importlib.util.find_spec(words[2])
    else:
        assert words[1].endswith("tune/search.py")
        kind, rest = SearchConfig, words[2:]
    cli.parse_config(kind, cli.Parser(prog="test"), rest)


# --- ray up ---


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_launcher_accepts_it(name: str) -> None:
    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_misspelled_key_is_refused(name: str) -> None:
    with pytest.raises(Exception, match="idle_timeout_minuts"):
        validate_config(prepare_config(read(name) | {"idle_timeout_minuts": 5}))


@pytest.mark.parametrize("name", CLOUDS)
def test_head_runs_no_work_and_workers_are_spot_gpus_from_zero(name: str) -> None:
    prepared = prepare_config(read(name))
    types = prepared["available_node_types"]
    head = types.pop(prepared["head_node_type"])
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert types
    for worker in types.values():
        assert worker["resources"]["GPU"] >= 1
        assert worker["min_workers"] == 0
        assert worker["max_workers"] <= prepared["max_workers"]
        assert "spot" in yaml.dump(worker["node_config"]).lower()


@pytest.mark.parametrize("name", CLOUDS)
def test_image_and_python_are_pinned(name: str) -> None:
    cluster = read(name)
    assert cluster["docker"]["image"].startswith(f"rayproject/ray:{pinned('ray')}-py3")
    assert any("-r requirements.txt" in line for line in cluster["setup_commands"])


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_node_has_the_token_and_the_code(name: str) -> None:
    mounts = read(name)["file_mounts"]
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    assert {"ldm_ray", "serve", "tune", "requirements.txt"} <= set(mounts.values())
    for local in mounts.values():
        assert (ROOT / local).exists(), local


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_is_not_open_to_the_world_and_reports_nothing(name: str) -> None:
    head, worker = starts(read(name))
    assert "--dashboard-host=127.0.0.1" in head
    for line in (head, worker):
        assert "RAY_AUTH_MODE=token " in line and "--disable-usage-stats" in line


@pytest.mark.parametrize("name", CLOUDS)
def test_commands_are_told_what_the_cluster_can_have(name: str) -> None:
    cluster = read(name)
    worker = cluster["available_node_types"]["gpu_worker"]
    most = {kind: worker["max_workers"] * worker["resources"][kind] for kind in ("CPU", "GPU")}
    assert f"-e LDM_RAY_CPUS={most['CPU']} -e LDM_RAY_GPUS={most['GPU']}" in cluster["docker"]["run_options"]


@pytest.mark.parametrize("name", CLOUDS)
def test_the_shared_folder_is_in_every_container(name: str) -> None:
    cluster = read(name)
    options = cluster["docker"]["run_options"]
    assert "-v /shared:/shared" in options and "-e SCRATCH=/shared" in options
    assert any("exportfs" in line for line in cluster["initialization_commands"])
    assert any(
        ":/shared /shared" in c for c in cluster["available_node_types"]["gpu_worker"]["initialization_commands"]
    )


# --- KubeRay ---


def manifests() -> dict[str, dict[str, Any]]:
    return {file.name: read(str(file.relative_to(ROOT))) for file in sorted(KUBERAY.glob("*.yaml"))}


def spec_of(manifest: dict[str, Any]) -> dict[str, Any]:
    found = manifest["spec"]
    return found if manifest["kind"] == "RayCluster" else found[SPEC[manifest["kind"]]]  # type: ignore[no-any-return]


def test_kinds_and_one_cluster_for_all() -> None:
    found = manifests()
    assert found.pop("storage.yaml")["spec"]["accessModes"] == ["ReadWriteMany"]
    kinds = {name: manifest["kind"] for name, manifest in found.items()}
    assert kinds == {
        "raycluster.yaml": "RayCluster",
        "rayjob-generate.yaml": "RayJob",
        "rayjob-train.yaml": "RayJob",
        "rayjob-tune.yaml": "RayJob",
        "rayservice.yaml": "RayService",
    }
    for manifest in found.values():
        assert manifest["apiVersion"] == "ray.io/v1" and manifest["metadata"]["name"]
        assert spec_of(manifest) == found["raycluster.yaml"]["spec"]


def test_the_cluster_is_closed_scales_from_zero_and_shares_a_folder() -> None:
    spec = spec_of(manifests()["raycluster.yaml"])
    assert spec["rayVersion"] == pinned("ray")
    assert spec["authOptions"] == {"mode": "token"} and spec["enableInTreeAutoscaling"] is True
    head, [worker] = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0" and head["serviceType"] == "ClusterIP"
    assert worker["minReplicas"] == worker["replicas"] == 0 < worker["maxReplicas"]
    env = {entry["name"]: entry.get("value") for entry in head["template"]["spec"]["containers"][0]["env"]}
    assert env["LDM_RAY_CPUS"] == str(4 * worker["maxReplicas"]) and env["LDM_RAY_GPUS"] == str(worker["maxReplicas"])
    claims = set()
    for group in (head, worker):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        claims |= {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
    assert worker["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert claims == {manifests()["storage.yaml"]["metadata"]["name"]}


@pytest.mark.parametrize("what", ["train", "generate", "tune"])
def test_jobs_run_commands_that_exist_and_go_on(what: str) -> None:
    job = manifests()[f"rayjob-{what}.yaml"]["spec"]
    words = shlex.split(job["entrypoint"])
    check_command(words)
    assert job["backoffLimit"] > 0 and job["shutdownAfterJobFinishes"] is True
    assert what == "generate" or {"--auto-resume", "--resume"} & set(words)
    with pytest.raises(SystemExit):
        check_command([*words, "--no-such-flag"])


def test_the_service_is_one_that_serve_and_the_application_accept() -> None:
    from serve.settings import Settings

    service = manifests()["rayservice.yaml"]["spec"]
    for text in (service["serveConfigV2"], (ROOT / "serve" / "config.yaml").read_text(encoding="utf-8")):
        parsed = ServeDeploySchema.model_validate(yaml.safe_load(text))
        [application] = parsed.applications
        assert application.import_path == "serve.app:deployment"
        Settings.model_validate(application.args)


def test_the_image_has_the_pinned_ray_and_all_of_the_code() -> None:
    lines = (KUBERAY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert f"FROM rayproject/ray:{pinned('ray')}-py311-gpu" in lines
    for line in lines:
        if line.startswith("COPY"):
            assert all((ROOT / name).exists() for name in line.split()[2:-1])


# --- Slurm (its run is in test_slurm.py) ---

SBATCH = ROOT / "deploy" / "slurm" / "ldm_ray.sbatch"


def test_the_sbatch_script_is_sound() -> None:
    subprocess.run(["bash", "-n", SBATCH], check=True)
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("needs shellcheck")
    done = subprocess.run([checker, SBATCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_commands_in_the_sbatch_script_are_accepted() -> None:
    lines = re.findall(r"^#   sbatch deploy/slurm/ldm_ray.sbatch(.*)$", SBATCH.read_text(encoding="utf-8"), re.M)
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line.split("     ")[0])
        check_command(words if words[:1] == ["python"] else ["python", "-m", "ldm_ray.train", "--auto-resume", *words])
