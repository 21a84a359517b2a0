"""The files for clusters, offline: what Ray's own schemas, the commands' own parsers and shellcheck say of them."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import jsonpatch
import pytest
import torch
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.job.job_supervisor import JobSupervisor
from ray.serve.schema import ServeDeploySchema

from ldm_ray.devices import cuda
from ldm_ray.search.space import SearchConfig
from ldm_ray.settings.datasets import GenerateConfig
from ldm_ray.settings.training import TrainConfig
from ldm_ray.terminal import flags
from tests.helpers.data import ROOT

LAUNCHED = ["cluster.yaml", "deploy/gcp.yaml", "deploy/local.yaml"]
CLOUDS = LAUNCHED[:2]
KUBERAY = ROOT / "deploy" / "kuberay"
INSTALL = ROOT / "deploy" / "install.sh"
SPEC = {"RayCluster": "spec", "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
PARSERS = {"ldm_ray.train": TrainConfig, "ldm_ray.generate": GenerateConfig}


def pins(name: str = "requirements.txt") -> dict[str, set[str]]:
    """The releases of each package in a lock; some depend on Python's."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if match := re.match(r"([\w.-]+)==(\S+)", line):
            found.setdefault(match[1], set()).add(match[2])
    return found


def pinned(package: str) -> str:
    [version] = pins()[package]
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
    flags.parse_config(kind, flags.Parser(prog="test"), rest)


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
    assert "cd ~/ldm_ray && sh deploy/install.sh" in cluster["setup_commands"]


@pytest.mark.parametrize("name", CLOUDS)
def test_the_machines_have_a_driver_that_suits_torch(name: str) -> None:
    """The image's name has its driver's branch, or the comment above it."""
    needed = cuda.driver_needed(pinned("nvidia-cuda-runtime"))
    text = (ROOT / name).read_text(encoding="utf-8")
    drivers = re.findall(r"nvidia-(\d{3})$|NVIDIA driver (\d{3})", text, re.M)
    assert drivers
    for driver in drivers:
        assert int("".join(driver)) >= needed[0], name
    for kind in read(name)["available_node_types"].values():
        assert "latest" in kind["node_config"].get("ImageId", "") or "nvidia-" in yaml.dump(kind["node_config"])


def test_the_lock_is_of_the_cuda_that_torch_has() -> None:
    if torch.version.cuda is None:
        pytest.skip("torch is built without CUDA here")
    assert pinned("nvidia-cuda-runtime").startswith(torch.version.cuda + ".")
    head = (INSTALL).read_text(encoding="utf-8")
    older, newer = (cuda.driver_needed(version)[0] for version in ("12", torch.version.cuda))
    assert f"is {torch.version.cuda} and needs NVIDIA's driver {newer} or newer" in " ".join(head.split("\n# "))
    assert f"cu126 (drivers from {older} on)" in head


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_stopped_job_gets_the_time_to_save(name: str) -> None:
    assert "RAY_JOB_STOP_WAIT_TIME_S=120" in (ROOT / name).read_text(encoding="utf-8")
    assert "RAY_JOB_STOP_WAIT_TIME_S" in inspect.getsource(inspect.unwrap(JobSupervisor.run))


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An AWS account of moto's."""
    for variable in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{variable}", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", read("cluster.yaml")["provider"]["region"])
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        yield


def rights(name: str) -> dict[str, list[str]]:
    document = boto3.client("iam").get_role_policy(RoleName=name, PolicyName=name)["PolicyDocument"]
    return {action: rule["Resource"] for rule in document["Statement"] for action in rule["Action"]}


def test_every_machine_has_a_profile_that_opens_the_bucket(account: None) -> None:
    """deploy/aws_roles.py, and Ray's own launcher with the file's machines."""
    from deploy import aws_roles

    aws_roles.main(["runs"])
    aws_roles.main(["runs", "more"])
    cluster = read("cluster.yaml")
    subnet = boto3.client("ec2").describe_subnets()["Subnets"][0]["SubnetId"]
    provider = AWSNodeProvider(cluster["provider"], cluster["cluster_name"])
    profiles = {}
    for kind, node in cluster["available_node_types"].items():
        [made] = provider.create_node(node["node_config"] | {"SubnetIds": [subnet]}, {}, 1).values()
        profiles[kind] = made.iam_instance_profile["Arn"].rpartition("/")[2]
    assert profiles == {"head": aws_roles.HEAD, "gpu_worker": aws_roles.WORKER}
    for name in profiles.values():
        assert rights(name)["s3:PutObject"] == ["arn:aws:s3:::runs/*", "arn:aws:s3:::more/*"]
    assert rights(aws_roles.HEAD)["iam:PassRole"] == [
        boto3.client("iam").get_role(RoleName=aws_roles.WORKER)["Role"]["Arn"]
    ]
    assert not any(action.startswith(("iam", "ec2")) for action in rights(aws_roles.WORKER))
    with pytest.raises(SystemExit, match="name the buckets"):
        aws_roles.main(["s3://runs"])


# --- what nodes install ---


def test_nodes_install_the_part_of_the_lock_that_is_not_for_development() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed, dev = (
        re.findall(r'^    "([\w-]+)', part, re.M) for part in project.split("[project.optional-dependencies]")
    )
    nodes, everything = pins("deploy/requirements.txt"), pins()
    assert {name.lower() for name in needed} <= nodes.keys() and "setuptools" in nodes
    assert not {"moto", "mypy", "pytest", "ruff", "schemathesis", "diffusers"} & nodes.keys() & set(dev)
    assert all(releases <= everything[name] for name, releases in nodes.items())


def installed(folder: Path, lock: str, **settings: str) -> tuple[int, list[str]]:
    """(exit code, words that pip would be called with, its lock's lines behind) of the script with a Python that notes
    them."""
    stub = folder / "python"
    stub.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then echo {folder}; exit; fi\n'
        f'for word; do echo "$word"; [ "$before" = -r ] && cat "$word"; before=$word; done >{folder}/called\n'
        f'echo "$PIP_EXTRA_INDEX_URL" >>{folder}/called\n'
    )
    stub.chmod(0o755)
    (folder / "lock").write_text(lock)
    (folder / "called").unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "LDM_RAY_CUDA"} | settings
    done = subprocess.run(["sh", INSTALL, stub, folder / "lock"], env=environment, capture_output=True)
    called = folder / "called"
    return done.returncode, called.read_text().splitlines() if called.exists() else []


LOCK = "numpy==2.4.6\nnvidia-cublas==13.1.1.3 ; sys_platform == 'linux'\ncuda-toolkit==13.0.3.0\ntorch==2.14.1\n"
LOCK += "    # via torch\ntorchvision==0.29.1\ntriton==3.8.0 ; python_full_version < '3.15'\n"


def test_one_variable_takes_torch_of_another_cuda(tmp_path: Path) -> None:
    code, words = installed(tmp_path, LOCK)
    assert code == 0 and words[:2] == ["-m", "pip"] and not set(LOCK.splitlines()) - set(words)
    address = "https://packages.example/whl/cu126"
    code, words = installed(tmp_path, LOCK, LDM_RAY_CUDA=address)
    assert code == 0 and words[-1] == address
    assert {"numpy==2.4.6", "torch==2.14.1+cu126", "torchvision==0.29.1+cu126"} <= set(words)
    assert not any(word.startswith(("nvidia-", "cuda-", "triton")) for word in words)


def test_what_an_image_has_is_not_installed_again(tmp_path: Path) -> None:
    assert installed(tmp_path, LOCK)[1]
    assert installed(tmp_path, LOCK) == (0, [])
    assert installed(tmp_path, LOCK + "six==1.17.0\n")[1]
    assert installed(tmp_path, LOCK, LDM_RAY_CUDA="https://packages.example/whl/cpu")[1]


def test_a_cuda_that_is_none_is_refused(tmp_path: Path) -> None:
    for wrong in ("12.6", "cu126", "https://packages.example/whl"):
        assert installed(tmp_path, LOCK, LDM_RAY_CUDA=wrong) == (2, [])


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_node_has_the_token_and_the_code(name: str) -> None:
    mounts = read(name)["file_mounts"]
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    assert {"ldm_ray", "serve", "tune", "deploy/install.sh", "deploy/requirements.txt"} <= set(mounts.values())
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


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERAY / name).read_text(encoding="utf-8")))


def rays() -> dict[str, dict[str, Any]]:
    """KubeRay's own manifests by the name of the file."""
    names = [file.name for file in sorted(KUBERAY.glob("ray*.yaml"))]
    return {name: manifest for name in names for manifest in documents(name)}


def spec_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return spec if manifest["kind"] == "RayCluster" else spec[SPEC[manifest["kind"]]]  # type: ignore[no-any-return]


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_kinds_and_one_cluster_for_all() -> None:
    manifests = rays()
    kinds = {name: manifest["kind"] for name, manifest in manifests.items()}
    assert kinds == {
        "raycluster.yaml": "RayCluster",
        "rayjob-generate.yaml": "RayJob",
        "rayjob-train.yaml": "RayJob",
        "rayjob-tune.yaml": "RayJob",
        "rayservice.yaml": "RayService",
    }
    for manifest in manifests.values():
        assert manifest["apiVersion"] == "ray.io/v1" and manifest["metadata"]["name"]
        spec = copy.deepcopy(spec_of(manifest))
        if manifest["kind"] == "RayService":  # what it has besides has a test of its own
            del spec["gcsFaultToleranceOptions"]
            for pod in pods(spec):
                del pod["containers"][0]["env"]
        assert spec == manifests["raycluster.yaml"]["spec"]


def test_the_cluster_is_closed_scales_from_zero_and_shares_a_folder() -> None:
    spec = spec_of(rays()["raycluster.yaml"])
    assert spec["rayVersion"] == pinned("ray")
    assert spec["authOptions"] == {"mode": "token"}
    head, workers = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0" and head["serviceType"] == "ClusterIP"
    assert all(worker["minReplicas"] == worker["replicas"] == 0 < worker["maxReplicas"] for worker in workers)
    shared = {manifest["kind"]: manifest for manifest in documents("shared.yaml")}
    assert shared["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(spec):
        [container] = pod["containers"]
        assert container["envFrom"] == [{"configMapRef": {"name": shared["ConfigMap"]["metadata"]["name"]}}]
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        [volume] = pod["volumes"]
        claim = volume["persistentVolumeClaim"]["claimName"]
        assert claim == shared["PersistentVolumeClaim"]["metadata"]["name"]
    environment = shared["ConfigMap"]["data"]
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0" and environment["SCRATCH"] == "/shared"
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


def test_the_second_autoscaler_has_what_it_needs() -> None:
    """KubeRay refuses version v2 with pods that are restarted, or together with Ray's own variable."""
    spec = spec_of(rays()["raycluster.yaml"])
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["version"] == "v2"
    assert {pod["restartPolicy"] for pod in pods(spec)} == {"Never"}
    assert "RAY_enable_autoscaler_v2" not in "".join(file.read_text() for file in KUBERAY.glob("*.yaml"))


def most(spec: dict[str, Any]) -> dict[str, str]:
    """What all workers together can have, in the words of the environment."""
    total = {"cpu": 0, "nvidia.com/gpu": 0}
    for group in spec["workerGroupSpecs"]:
        [container] = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        for name in total:
            total[name] += group["maxReplicas"] * int(container["resources"]["limits"].get(name, 0))
    return {"LDM_RAY_CPUS": str(total["cpu"]), "LDM_RAY_GPUS": str(total["nvidia.com/gpu"])}


def test_there_are_workers_with_and_without_a_gpu() -> None:
    spec = spec_of(rays()["raycluster.yaml"])
    gpu, cpu = (group["template"]["spec"]["containers"][0] for group in spec["workerGroupSpecs"])
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == "1" and "nvidia.com/gpu" not in cpu["resources"]["limits"]
    [environment] = [manifest["data"] for manifest in documents("shared.yaml") if manifest["kind"] == "ConfigMap"]
    assert most(spec).items() <= environment.items()


def without_gpus() -> list[dict[str, Any]]:
    """deploy/kuberay-cpu as kustomize makes it of deploy/kuberay."""
    overlay = read("deploy/kuberay-cpu/kustomization.yaml")
    assert overlay["resources"] == ["../kuberay"]
    manifests = [
        manifest for name in read("deploy/kuberay/kustomization.yaml")["resources"] for manifest in documents(name)
    ]
    for patch in overlay["patches"]:
        targets = [manifest for manifest in manifests if manifest["kind"] == patch["target"]["kind"]]
        assert targets
        for target in targets:
            jsonpatch.apply_patch(target, yaml.safe_load(patch["patch"]), in_place=True)
    return manifests


def test_an_overlay_has_all_of_it_without_gpus() -> None:
    manifests = without_gpus()
    [environment] = [manifest["data"] for manifest in manifests if manifest["kind"] == "ConfigMap"]
    assert environment["LDM_RAY_GPUS"] == "0"
    clusters = [spec_of(manifest) for manifest in manifests if manifest["kind"] in SPEC]
    assert len(clusters) == len(rays())
    for spec in clusters:
        assert [group["groupName"] for group in spec["workerGroupSpecs"]] == ["cpu"]
        assert most(spec).items() <= environment.items()


def test_kustomize_makes_the_same_of_them() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl")
    made = subprocess.run([kubectl, "kustomize", KUBERAY.with_name("kuberay-cpu")], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    key = lambda manifest: (manifest["kind"], manifest["metadata"]["name"])  # noqa: E731
    assert sorted(yaml.safe_load_all(made.stdout), key=key) == sorted(without_gpus(), key=key)


def test_everything_of_kuberay_can_be_picked_by_its_label() -> None:
    listed = read("deploy/kuberay/kustomization.yaml")["resources"]
    assert set(listed) == {file.name for file in KUBERAY.glob("*.yaml")} - {"kustomization.yaml"}
    labels = {manifest["metadata"]["labels"]["ldm-ray"] for name in listed for manifest in documents(name)}
    assert labels == {"shared", "cluster", "train", "tune", "generate", "service"}


@pytest.mark.parametrize("what", ["train", "generate", "tune"])
def test_jobs_run_commands_that_exist_and_go_on(what: str) -> None:
    job = rays()[f"rayjob-{what}.yaml"]["spec"]
    words = shlex.split(job["entrypoint"])
    check_command(words)
    assert job["backoffLimit"] > 0 and job["shutdownAfterJobFinishes"] is True
    assert what == "generate" or {"--auto-resume", "--resume"} & set(words)
    assert what == "generate" or words[words.index("--dataset") + 1] != "auto"  # which falls back on other images
    with pytest.raises(SystemExit):
        check_command([*words, "--no-such-flag"])


def test_the_service_outlives_its_head_and_has_a_token() -> None:
    spec = spec_of(rays()["rayservice.yaml"])
    redis = {manifest["kind"]: manifest for manifest in documents("redis.yaml")}
    options = spec["gcsFaultToleranceOptions"]
    service = redis["Service"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    [server] = redis["Deployment"]["spec"]["template"]["spec"]["containers"]
    [password] = server["env"]
    assert password["valueFrom"] == options["redisPassword"]["valueFrom"]
    assert "--requirepass" in server["command"][-1] and "--appendonly yes" in server["command"][-1]
    selector = service["spec"]["selector"]
    assert selector == redis["Deployment"]["spec"]["template"]["metadata"]["labels"]
    [volume] = redis["Deployment"]["spec"]["template"]["spec"]["volumes"]
    claim = redis["PersistentVolumeClaim"]["metadata"]["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim
    header = (KUBERAY / "rayservice.yaml").read_text(encoding="utf-8").partition("apiVersion")[0]
    for pod in pods(spec):
        [token] = pod["containers"][0]["env"]
        reference = token["valueFrom"]["secretKeyRef"]
        assert token["name"] == "LDM_RAY_TOKEN" and not reference.get("optional")
        for key in (reference["key"], password["valueFrom"]["secretKeyRef"]["key"]):
            assert f"--from-literal={key}=" in header
        assert f"create secret generic {reference['name']} " in header


def test_the_service_is_one_that_serve_and_the_application_accept() -> None:
    from ldm_ray.service.settings import Settings

    service = rays()["rayservice.yaml"]["spec"]
    for text in (service["serveConfigV2"], (ROOT / "serve" / "config.yaml").read_text(encoding="utf-8")):
        parsed = ServeDeploySchema.model_validate(yaml.safe_load(text))
        [application] = parsed.applications
        assert application.import_path == "serve.app:deployment"
        Settings.model_validate(application.args)


def test_the_image_has_the_pinned_ray_and_all_of_the_code() -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert f"FROM rayproject/ray:{pinned('ray')}-py311-gpu" in lines
    for line in lines:
        if line.startswith("COPY"):
            assert all((ROOT / name).exists() for name in line.split()[2:-1])
    assert any(line.startswith("RUN") and "sh deploy/install.sh" in line for line in lines)


# --- Slurm (its run is in test_slurm.py) ---

SBATCH = ROOT / "deploy" / "slurm" / "ldm_ray.sbatch"


def test_the_shell_scripts_are_sound() -> None:
    subprocess.run(["bash", "-n", SBATCH], check=True)
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("needs shellcheck")
    done = subprocess.run([checker, SBATCH, INSTALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_commands_in_the_sbatch_script_are_accepted() -> None:
    lines = re.findall(r"^#   sbatch deploy/slurm/ldm_ray.sbatch(.*)$", SBATCH.read_text(encoding="utf-8"), re.M)
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line.split("     ")[0])
        check_command(words if words[:1] == ["python"] else ["python", "-m", "ldm_ray.train", "--auto-resume", *words])
