"""Training on two nodes into an object store, with a loss of the whole cluster on the way."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import torch

from ldm_ray.checkpoints import checkpoint
from ldm_ray.files.paths import AnyPath, to_path
from tests.helpers.clusters import lose_all, two_nodes
from tests.helpers.commands import finish, meanwhile, run, start, wait_for
from tests.helpers.runs import SMALL, epochs


def recorded(out: AnyPath) -> list[int]:
    return [line["epoch"] for line in epochs(out)]


def test_training_on_two_nodes_into_s3_and_on_a_disk_gives_the_same_weights(
    ray_here: None, bucket: str, digits_folder: Path, ae_file: Path, tmp_path: Path
) -> None:
    """On the way the whole cluster is lost, head and all; another one goes on from the store alone, with a stop."""
    root = to_path(bucket) / "runs"
    kept = root / "autoencoder.pt"
    kept.write_bytes(ae_file.read_bytes())
    flags = ["--dataset", digits_folder, *SMALL, "--epochs", 30, "--checkpoint-every", 1, "--num-workers", 2]
    flags_of_run = [*flags, "--ae-ckpt", kept, "--outdir", root]
    with two_nodes() as cluster:
        process = start("-m", "ldm_ray.train", *flags_of_run, env={"RAY_ADDRESS": cluster.address})
        wait_for(lambda: len(recorded(root)) > 1, process)
        lose_all(cluster)
        output = finish(process, 2)
        assert "training failed" in output and "--auto-resume" in output and "Traceback" not in output
    first = len(recorded(root))
    with meanwhile(lambda: len(recorded(root)) > first, lambda _: os.kill(os.getpid(), signal.SIGINT)):
        assert "going on with" in run("train", *flags_of_run, "--auto-resume", code=130)
    second = len(recorded(root))
    run("train", *flags_of_run, "--auto-resume")
    run("train", *flags, "--ae-ckpt", ae_file, "--outdir", tmp_path / "disk")
    assert 1 < first < second < 30 and recorded(root) == recorded(tmp_path / "disk") == list(range(1, 31))
    [latest] = to_path(str(root)).glob("checkpoints/*/latest.pt")
    name = latest.parent.name
    in_store, _ = checkpoint.read(root / "checkpoints" / name / "latest.pt")
    on_disk, _ = checkpoint.read(next((tmp_path / "disk").glob("checkpoints/*/latest.pt")))
    for part in ("model", "ema"):
        assert all(torch.equal(in_store[part][key], on_disk[part][key]) for key in on_disk[part])
    logged = re.findall(r"epoch +(\d+)/30  train ", (root / "logs" / f"{name}.log").read_text())
    assert {int(epoch) for epoch in logged} == set(range(1, 31))
    assert list(root.glob(f"runs/{name}/events.out.tfevents.*"))
    run("infer", "--outdir", root, "--output", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
