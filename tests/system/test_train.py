"""``python -m ldm_ray.train`` and what it writes, on Ray, with embedded digits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.helpers.checkpoints import same_weights
from tests.helpers.commands import only, run

pytestmark = pytest.mark.usefixtures("ray_here")
RUN = "latent-diffusion-dall-bs64-lr0.001-T50-seed42-????????-??????"
TRAIN = ["--epochs", "3", "--batch-size", "64", "--lr", "1e-3", "--T", "50", "--beta-end", "0.2", "--device", "cpu"]


@pytest.fixture(scope="module")
def ae_ckpt(tmp_path_factory: pytest.TempPathFactory, digits_folder: Path) -> Path:
    """A small autoencoder, trained through the command."""
    out = tmp_path_factory.mktemp("autoencoder")
    flags = ["--model", "mlp", "--epochs", 4, "--batch-size", 32, "--generate-images", "--outdir", out]
    run("train_autoencoder", "--dataset", digits_folder, *flags, "--device", "cpu")
    picture = only(out, "samples/ae-mlp-dall-bs32-lr0.004-D16-seed42-*/epoch_000004.png")
    assert Image.open(picture).mode == "L"
    return only(out, "checkpoints/ae-mlp-*/latest.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits_folder: Path, ae_ckpt: Path) -> Path:
    """The output directory of an undisturbed one-worker run."""
    out = tmp_path_factory.mktemp("undisturbed")
    flags = ["--dataset", digits_folder, "--ae-ckpt", ae_ckpt, "--outdir", out, "--generate-images"]
    run("train", *flags, *TRAIN)
    return out


def test_autoencoder_learns(ae_ckpt: Path) -> None:
    lines = (ae_ckpt.parents[2] / "runs" / ae_ckpt.parent.name / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["val_loss"] for line in lines]
    assert len(losses) == 4 and losses[-1] < 0.75 * losses[0]


def test_output_tree(trained: Path) -> None:
    checkpoints = only(trained / "checkpoints", RUN)
    name = checkpoints.name
    assert sorted(file.name for file in checkpoints.iterdir()) == [
        *(f"checkpoint_epoch_{epoch:06d}.pt" for epoch in (1, 2, 3)),
        "latest.pt",
    ]
    assert sorted(file.name for file in (trained / "samples" / name).iterdir()) == [
        f"epoch_{epoch:06d}.png" for epoch in (1, 2, 3)
    ]
    assert Image.open(trained / "samples" / name / "epoch_000003.png").size == (122, 122)  # 4x4, padding 2
    metrics = [json.loads(line) for line in (trained / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics] == [1, 2, 3]
    assert metrics[2]["train_loss"] < metrics[0]["train_loss"]
    assert list((trained / "runs" / name).glob("events.out.tfevents.*"))
    assert "epoch   3/3" in (trained / "logs" / f"{name}.log").read_text()


def test_checkpoint_holds_the_detected_autoencoder(trained: Path, ae_ckpt: Path) -> None:
    content = torch.load(only(trained / "checkpoints", f"{RUN}/checkpoint_epoch_000003.pt"), weights_only=True)
    assert content["autoencoder"]["type"] == "mlp"
    assert content["args"]["ae_model"] == "ae-mlp"
    assert "training" not in content
    own = torch.load(ae_ckpt, weights_only=True)["model"]
    assert all(torch.equal(own[name], tensor) for name, tensor in content["autoencoder"]["model"].items())


def test_latents_are_plain_parquet(trained: Path, digits_folder: Path) -> None:
    folder = only(trained / "latents", "*")
    table = pq.read_table(folder / "part-00000.parquet")
    source = pq.read_table(next(digits_folder.glob("train-*.parquet")))
    assert str(table.schema.field("latent").type) in {
        "fixed_size_list<element: float>[16]",
        "fixed_size_list<item: float>[16]",
    }
    assert table["index"].to_pylist() == list(range(source.num_rows))
    assert table["label"].to_pylist() == source["label"].to_pylist()
    recorded = json.loads(table.schema.metadata[b"ldm_ray"])
    assert recorded["fingerprint"] == folder.name and recorded["count"] == source.num_rows
    latents = np.array(table["latent"].to_pylist())
    np.testing.assert_allclose(recorded["mean"], latents.mean(axis=0), atol=1e-5)


def test_infer(trained: Path, tmp_path: Path) -> None:
    ckpt = only(trained / "checkpoints", f"{RUN}/latest.pt")
    flags = ["--ckpt", ckpt, "--num-images", 16, "--digit", 3, "--device", "cpu", "--show-process"]
    run("infer", *flags, "--output", tmp_path / "a.png", "--process-steps", 5)
    run("infer", *flags, "--output", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open(tmp_path / "a.png").size == (122, 122)
    assert Image.open(tmp_path / "a_process.png").size == (5 * 30 + 2, 8 * 30 + 2)
    assert getattr(Image.open(tmp_path / "a_process.gif"), "n_frames", 0) == 10  # one a step


def test_two_workers(trained: Path, digits_folder: Path, ae_ckpt: Path, tmp_path: Path) -> None:
    flags = ["--dataset", digits_folder, "--ae-ckpt", ae_ckpt, "--outdir", tmp_path, "--num-workers", 2]
    run("train", *flags, *TRAIN)
    one = only(trained / "runs", f"{RUN}/metrics.jsonl").read_text().splitlines()
    two = only(tmp_path / "runs", f"{RUN}/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["workers"] for line in two] == [2, 2, 2]
    assert json.loads(two[-1])["val_loss"] == pytest.approx(json.loads(one[-1])["val_loss"], rel=0.15)


def test_resume_refuses_another_configuration(trained: Path, digits_folder: Path, ae_ckpt: Path) -> None:
    flags = ["--dataset", digits_folder, "--ae-ckpt", ae_ckpt, "--outdir", trained, "--auto-resume", *TRAIN]
    output = run("train", *flags, "--hidden-dim", 128, code=2)
    assert "--hidden-dim 256 then, 128 now" in output and "Traceback" not in output


def test_damaged_image_is_one_line(tmp_path: Path, digits_folder: Path, ae_ckpt: Path) -> None:
    table = pq.read_table(next(digits_folder.glob("train-*.parquet")))
    rows = table.to_pylist()
    rows[17]["image"]["bytes"] = rows[17]["image"]["bytes"][:60]
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), tmp_path / "train-0.parquet")
    flags = ["--dataset", tmp_path, "--ae-ckpt", ae_ckpt, "--outdir", tmp_path / "out", *TRAIN]
    output = run("train", *flags, code=2)
    assert "image 17" in output and "Traceback" not in output
    assert not list((tmp_path / "out").rglob("manifest.json"))


@dataclass(frozen=True)
class Second:
    """A second run beside the first, over the same images, that measures quality as it goes."""

    output: str
    latents_before: dict[Path, int]
    folder: Path
    lines: list[dict[str, Any]]


@pytest.fixture(scope="module")
def second(trained: Path, digits_folder: Path, ae_ckpt: Path) -> Second:
    before = changed(trained / "latents")
    flags = ["--evaluate-every", 2, "--evaluate-samples", 200, "--checkpoint-every", 5, "--epochs", 5, "--seed", 43]
    where = ["--dataset", digits_folder, "--ae-ckpt", ae_ckpt, "--outdir", trained]
    output = run("train", *TRAIN, *where, *flags)
    folder = only(trained / "checkpoints", RUN.replace("seed42", "seed43"))
    quality = trained / "runs" / folder.name / "quality.jsonl"
    return Second(output, before, folder, [json.loads(line) for line in quality.read_text().splitlines()])


def changed(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_second_run_reuses_latents(second: Second, trained: Path) -> None:
    assert "reused" in second.output
    assert second.latents_before == changed(trained / "latents")


def test_quality_is_measured_beside_training_and_the_best_is_kept(second: Second) -> None:
    lines, folder = second.lines, second.folder
    assert [line["epoch"] for line in lines] == [2, 4, 5] and {line["count"] for line in lines} == {200}
    assert second.output.count("FD-LeNet") == 3
    assert "classifiers behind the figures were trained on MNIST, and" in second.output
    best = min(lines, key=lambda line: line["fd_lenet"])
    content = torch.load(folder / "best.pt", weights_only=True)
    assert content["quality"] == best and content["epoch"] == best["epoch"]
    assert same_weights(folder / "best.pt", folder / f"checkpoint_epoch_{best['epoch']:06d}.pt")
    assert f"{best['fd_lenet']:.4f}"[:4] in run("inspect", folder / "best.pt")
