"""The real thing, small: the commands on Ray, with embedded digits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

RUN = "latent-diffusion-dall-bs64-lr0.001-T50-seed42-????????-??????"
TRAIN = ["--epochs", "3", "--batch-size", "64", "--lr", "1e-3", "--T", "50", "--beta-end", "0.2", "--device", "cpu"]


def command(module: str, *flags: object, **settings: object) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", f"ldm_ray.{module}", *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(arguments, text=True, **pipes, **settings)  # type: ignore[call-overload]


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def weights(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=True)
    return {f"{part}.{name}": tensor for part in ("model", "ema") for name, tensor in content[part].items()}


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    assert len(found) == 1, found
    return found[0]


@pytest.fixture(scope="module")
def ae_ckpt(tmp_path_factory: pytest.TempPathFactory, digits_folder: Path) -> Path:
    """A small autoencoder, trained through the command."""
    out = tmp_path_factory.mktemp("autoencoder")
    flags = ["--model", "mlp", "--epochs", 4, "--batch-size", 32, "--generate-images", "--outdir", out]
    finish(command("train_autoencoder", "--dataset", digits_folder, *flags, "--device", "cpu"))
    made = only(out, "samples/ae-mlp-dall-bs32-lr0.004-D16-seed42-*/epoch_000004.png")
    assert Image.open(made).mode == "L"
    return only(out, "checkpoints/ae-mlp-*/latest.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits_folder: Path, ae_ckpt: Path) -> Path:
    """The output directory of an undisturbed one-worker run."""
    out = tmp_path_factory.mktemp("undisturbed")
    flags = ["--dataset", digits_folder, "--ae-ckpt", ae_ckpt, "--outdir", out, "--generate-images"]
    finish(command("train", *flags, *TRAIN))
    return out


def test_autoencoder_learns(ae_ckpt: Path) -> None:
    lines = (ae_ckpt.parents[2] / "runs" / ae_ckpt.parent.name / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["val_loss"] for line in lines]
    assert len(losses) == 4 and losses[-1] < 0.75 * losses[0]


def test_output_tree(trained: Path) -> None:
    run = only(trained / "checkpoints", RUN)
    assert sorted(file.name for file in run.iterdir()) == [
        *(f"checkpoint_epoch_{epoch:06d}.pt" for epoch in (1, 2, 3)),
        "latest.pt",
    ]
    assert sorted(file.name for file in (trained / "samples" / run.name).iterdir()) == [
        f"epoch_{epoch:06d}.png" for epoch in (1, 2, 3)
    ]
    assert Image.open(trained / "samples" / run.name / "epoch_000003.png").size == (122, 122)  # 4x4, padding 2
    metrics = [json.loads(line) for line in (trained / "runs" / run.name / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics] == [1, 2, 3]
    assert metrics[2]["train_loss"] < metrics[0]["train_loss"]
    assert list((trained / "runs" / run.name).glob("events.out.tfevents.*"))
    assert "epoch   3/3" in (trained / "logs" / f"{run.name}.log").read_text()


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


def test_second_run_reuses_latents(trained: Path, digits_folder: Path, ae_ckpt: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in (trained / "latents").rglob("*")}
    flags = ["--dataset", digits_folder, "--ae-ckpt", ae_ckpt, "--outdir", trained, "--seed", 43, "--epochs", 1]
    assert "reused" in finish(command("train", *flags, "--device", "cpu"))
    assert before == {file: file.stat().st_mtime_ns for file in (trained / "latents").rglob("*")}


def test_infer(trained: Path, tmp_path: Path) -> None:
    ckpt = only(trained / "checkpoints", f"{RUN}/latest.pt")
    flags = ["--ckpt", ckpt, "--num-images", 16, "--digit", 3, "--device", "cpu", "--show-process"]
    finish(command("infer", *flags, "--output", tmp_path / "a.png", "--process-steps", 5))
    finish(command("infer", *flags, "--output", tmp_path / "b.png"))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open(tmp_path / "a.png").size == (122, 122)
    assert Image.open(tmp_path / "a_process.png").size == (5 * 30 + 2, 8 * 30 + 2)
    assert getattr(Image.open(tmp_path / "a_process.gif"), "n_frames", 0) == 10  # one a step


def test_two_workers(trained: Path, digits_folder: Path, ae_ckpt: Path, tmp_path: Path) -> None:
    flags = ["--dataset", digits_folder, "--ae-ckpt", ae_ckpt, "--outdir", tmp_path, "--num-workers", 2]
    finish(command("train", *flags, *TRAIN))
    one = only(trained / "runs", f"{RUN}/metrics.jsonl").read_text().splitlines()
    two = only(tmp_path / "runs", f"{RUN}/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["workers"] for line in two] == [2, 2, 2]
    assert json.loads(two[-1])["val_loss"] == pytest.approx(json.loads(one[-1])["val_loss"], rel=0.15)


def training_worker(driver: int) -> psutil.Process:
    """The process that trains, below the given driver."""
    for child in psutil.Process(driver).children(recursive=True):
        try:
            if "TrainWorker" in " ".join(child.cmdline()):
                return child
        except psutil.Error:
            continue
    raise AssertionError("no training worker found")


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 120) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


LONG = ["--epochs", "30", "--batch-size", "8", "--lr", "1e-3", "--T", "50", "--device", "cpu", "--hidden-dim", "32"]
LONG_RUN = "latent-diffusion-dall-bs8-lr0.001-T50-seed42-*"


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory, digits_folder: Path, ae_ckpt: Path) -> Path:
    out = tmp_path_factory.mktemp("long")
    finish(command("train", "--dataset", digits_folder, "--ae-ckpt", ae_ckpt, "--outdir", out, *LONG))
    return only(out, f"checkpoints/{LONG_RUN}/latest.pt")


def test_killed_worker_ends_with_the_same_weights(
    long_run: Path, digits_folder: Path, ae_ckpt: Path, tmp_path: Path
) -> None:
    process = command("train", "--dataset", digits_folder, "--ae-ckpt", ae_ckpt, "--outdir", tmp_path, *LONG)
    wait_for(lambda: len(list(tmp_path.glob(f"checkpoints/{LONG_RUN}/checkpoint_*.pt"))) >= 3, process)
    training_worker(process.pid).kill()
    finish(process)
    assert same_weights(long_run, only(tmp_path, f"checkpoints/{LONG_RUN}/latest.pt"))
    lines = only(tmp_path, f"runs/{LONG_RUN}/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, 31))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGKILL])
def test_stop_and_resume_bit_for_bit(
    number: signal.Signals, long_run: Path, digits_folder: Path, ae_ckpt: Path, tmp_path: Path
) -> None:
    flags = ["--dataset", digits_folder, "--ae-ckpt", ae_ckpt, "--outdir", tmp_path, *LONG, "--auto-resume"]
    process = command("train", *flags, start_new_session=True)
    wait_for(lambda: len(list(tmp_path.glob(f"checkpoints/{LONG_RUN}/checkpoint_*.pt"))) >= 2, process)
    os.kill(process.pid, number)
    output = finish(process, -number if number == signal.SIGKILL else 128 + number)
    assert number == signal.SIGKILL or "--auto-resume" in output
    latest = only(tmp_path, f"checkpoints/{LONG_RUN}/latest.pt")
    assert torch.load(latest, weights_only=True)["epoch"] < 30
    assert "going on with" in finish(command("train", *flags))
    assert same_weights(long_run, latest)


def test_resume_refuses_another_configuration(trained: Path, digits_folder: Path, ae_ckpt: Path) -> None:
    flags = ["--dataset", digits_folder, "--ae-ckpt", ae_ckpt, "--outdir", trained, "--auto-resume", *TRAIN]
    output = finish(command("train", *flags, "--hidden-dim", 128), 2)
    assert "--hidden-dim 256 then, 128 now" in output and "Traceback" not in output


def test_no_network_and_no_autoencoder(tmp_path: Path, digits_folder: Path) -> None:
    flags = ["--dataset", digits_folder, "--outdir", tmp_path, "--epochs", 1, "--T", 10, "--device", "cpu"]
    output = finish(command("train", *flags))
    assert "training one first (mlp)" in output
    assert only(tmp_path, "checkpoints/ae-mlp-*/latest.pt")
    assert only(tmp_path, "checkpoints/latent-diffusion-*/latest.pt")


def test_damaged_image_is_one_line(tmp_path: Path, digits_folder: Path, ae_ckpt: Path) -> None:
    table = pq.read_table(next(digits_folder.glob("train-*.parquet")))
    rows = table.to_pylist()
    rows[17]["image"]["bytes"] = rows[17]["image"]["bytes"][:60]
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), tmp_path / "train-0.parquet")
    flags = ["--dataset", tmp_path, "--ae-ckpt", ae_ckpt, "--outdir", tmp_path / "out", *TRAIN]
    output = finish(command("train", *flags), 2)
    assert "image 17" in output and "Traceback" not in output
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_quality_is_measured_beside_training_and_the_best_is_kept(
    tmp_path: Path, digits_folder: Path, ae_ckpt: Path
) -> None:
    flags = ["--evaluate-every", 2, "--evaluate-samples", 200, "--checkpoint-every", 5, "--epochs", 5]
    where = ["--dataset", digits_folder, "--ae-ckpt", ae_ckpt, "--outdir", tmp_path]
    output = finish(command("train", *TRAIN, *where, *flags))
    lines = [json.loads(line) for line in only(tmp_path, f"runs/{RUN}/quality.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [2, 4, 5] and {line["count"] for line in lines} == {200}
    assert output.count("FD-LeNet") == 3
    best = min(lines, key=lambda line: line["fd_lenet"])
    folder = only(tmp_path, f"checkpoints/{RUN}")
    content = torch.load(folder / "best.pt", weights_only=True)
    assert content["quality"] == best and content["epoch"] == best["epoch"]
    assert same_weights(folder / "best.pt", folder / f"checkpoint_epoch_{best['epoch']:06d}.pt")
    assert f"{best['fd_lenet']:.4f}"[:4] in finish(command("inspect", folder / "best.pt"))


def shapes(folder: Path) -> Path:
    """Folders of small pictures that are not square, of three classes."""
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for name in ("bar", "ring", "square"):
            where = folder / split / name
            where.mkdir(parents=True)
            for i in range(count):
                picture = np.zeros((20, 24), np.uint8)
                top, left = random.integers(1, 6, 2)
                picture[top : top + 12, left : left + (4 if name == "bar" else 12)] = 255
                if name == "ring":
                    picture[top + 3 : top + 9, left + 3 : left + 9] = 0
                Image.fromarray(picture).save(where / f"{i:02d}.png")
    return folder


def test_three_classes_of_another_size_from_folders_to_images(tmp_path: Path) -> None:
    folder, out = shapes(tmp_path / "shapes"), tmp_path / "out"
    common = ["--dataset", folder, "--outdir", out, "--device", "cpu"]
    finish(command("train_autoencoder", "--model", "conv", "--epochs", 2, "--latent-dim", 6, *common))
    flags = ["--epochs", 2, "--T", 20, "--generate-images", "--samples-per-epoch", 4, *common]
    assert "60 images of" in finish(command("train", *flags))
    ckpt = only(out, "checkpoints/latent-diffusion-*/latest.pt")
    content = torch.load(ckpt, weights_only=True)
    assert content["num_classes"] == 3 and content["data"]["class_names"] == ["bar", "ring", "square"]
    assert content["autoencoder"]["image_size"] == [20, 24] and content["model"]["class_emb.weight"].shape == (3, 256)
    assert np.asarray(Image.open(only(out, "samples/latent-diffusion-*/epoch_000002.png"))).shape == (46, 54)
    shown = finish(command("inspect", ckpt))
    assert "bar, ring, square" in shown
    picture = tmp_path / "ring.png"
    finish(command("infer", "--ckpt", ckpt, "--digit", "Ring", "--num-images", 1, "--output", picture))
    assert np.asarray(Image.open(picture)).shape == (20, 24)
    assert "nothing left to do" in finish(command("train", *flags, "--auto-resume"))
