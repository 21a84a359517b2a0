"""How fast ldm_ray is, next to the least that the same work takes.

  python benchmarks/pipeline.py                                  every part
  python benchmarks/pipeline.py --only loop encode --dataset FOLDER --ae-ckpt ae.pt

Each part measures its variants in turn, ``--repeats`` times, and prints medians with the ratios' median and
range. Nothing passes or fails here. Without ``--ae-ckpt`` an MLP with random weights stands in.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_ray.checkpoints import checkpoint
from ldm_ray.checkpoints.checkpoint import load_autoencoder
from ldm_ray.data.examples import read_examples, split
from ldm_ray.data.images import decode_png, to_float
from ldm_ray.data.sources import ImageSource, load_source
from ldm_ray.devices.device import autocast, pick_device
from ldm_ray.diffusion.objective import denoising_loss
from ldm_ray.diffusion.schedule import Noiser, NoiseSchedule
from ldm_ray.files.paths import AnyPath
from ldm_ray.models import registry
from ldm_ray.models.denoiser import Denoiser
from ldm_ray.settings.training import AutoencoderConfig, TrainConfig
from ldm_ray.training.fitter import Fitter
from ldm_ray.training.tasks import build_task

# A child's ru_maxrss starts at its parent's size on Linux, so there the child reads its own high-water mark.
MEASURED = """
import atexit, os, resource, runpy, sys
def peak():
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    if sys.platform == "linux":
        kib = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    open(os.environ["PEAK_FILE"], "w").write(str(kib / 1024))
atexit.register(peak)
sys.argv = sys.argv[1:]
__import__("torch") if sys.argv == ["torch"] else runpy.run_module(sys.argv[0], None, "__main__", True)
"""


@dataclass
class Bench:
    """dataset: absolute where it is a folder. scratch: all output goes there. peaks: MiB by command."""

    dataset: str
    ae_ckpt: Path
    scratch: Path
    repeats: int
    epochs: int
    peaks: dict[str, list[float]] = field(default_factory=dict)

    def source(self) -> ImageSource:
        return load_source(self.dataset, "train", self.scratch)

    def command(self, name: str, module: str, *flags: str) -> float:
        """Seconds that a command takes from start to exit; its peak memory goes to ``peaks``."""
        environment = os.environ | {"PEAK_FILE": str(self.scratch / "peak")}
        call = [sys.executable, "-c", MEASURED, module, *flags]
        started = time.perf_counter()
        done = subprocess.run(call, cwd=self.scratch, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(f"{module} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        self.peaks.setdefault(name, []).append(float((self.scratch / "peak").read_text()))
        return seconds

    def train(self) -> tuple[float, list[dict[str, Any]]]:
        """(wall time, metrics of the epochs) of ``python -m ldm_ray.train`` from an empty output directory."""
        base = Path(tempfile.mkdtemp(dir=self.scratch))
        given = f"--dataset={self.dataset}", f"--ae-ckpt={self.ae_ckpt}", f"--outdir={base}", f"--epochs={self.epochs}"
        wall = self.command("train driver", "ldm_ray.train", *given, f"--cache-dir={self.scratch}")
        return wall, jsonl(next(base.glob("runs/*/metrics.jsonl")))

    def infer(self, timesteps: int) -> float:
        """Wall time of ``python -m ldm_ray.infer`` for 64 images with a denoiser of so many timesteps."""
        ckpt = self.scratch / f"denoiser-{timesteps}.pt"
        if not ckpt.exists():
            autoencoder = load_autoencoder(self.ae_ckpt)
            denoiser, schedule = Denoiser(autoencoder.codec.latent_dim), NoiseSchedule(timesteps)
            checkpoint.write(ckpt, checkpoint.diffusion_content(denoiser, denoiser, schedule, autoencoder, {}))
        return self.command("infer", "ldm_ray.infer", "--num-images=64", f"--ckpt={ckpt}", "--output=made.png")


def loop(bench: Bench) -> None:
    """The denoiser's training loop through Ray Train against a bare one, on the same latents."""
    from ldm_ray.distributed.cluster import connected, resources, use_gpu
    from ldm_ray.distributed.encode import encode as encoded

    where: dict[str, Any] = {
        "dataset": bench.dataset,
        "ae_ckpt": str(bench.ae_ckpt),
        "outdir": str(bench.scratch / "loop"),
    }
    found = load_autoencoder(bench.ae_ckpt)
    with connected():
        device = "cuda" if use_gpu(None) else "cpu"
        torch.set_num_threads(resources()[0])  # as the one worker has
        examples = read_examples(encoded(bench.source(), found, bench.scratch / "loop"))
        codec = found.codec.with_statistics(examples.statistics)
        for amp in (False, True):
            config = TrainConfig(**where, cache_dir=str(bench.scratch), epochs=bench.epochs + 1, amp=amp)
            rows = examples.take(split(examples, config.val_fraction)[0])
            data, labels = codec.whiten(rows.vectors).to(device), rows.labels.to(device)
            metrics: list[list[dict[str, Any]]] = []
            bare = partial(lambda *given: len(given[0]) / timed(bare_epoch(*given), bench.epochs), data, labels, config)
            rates = in_turn({"bare": bare, "ray train": partial(through_ray, config, metrics)}, bench.repeats)
            rates["with validation, saving"] = [len(rows) / epoch_seconds(lines) for lines in metrics]
            show("loop amp" if amp else "loop fp32", rates, "images/s")


def through_ray(config: TrainConfig, metrics: list[Any]) -> float:
    """Images per second of a run's epochs from the second on; its records go to ``metrics``."""
    from ldm_ray.distributed import pipeline

    outcome = pipeline.train(config)
    if outcome.code:  # a signal came
        raise SystemExit(outcome.code)
    metrics.append(jsonl(outcome.paths.metrics))
    return statistics.median(line["images_per_s"] for line in metrics[-1][1:])


def bare_epoch(data: Tensor, labels: Tensor, config: TrainConfig) -> Callable[[], None]:
    """An epoch as one would write it by hand: no Ray, no averaged weights, no clipping, no resume."""
    device = data.device
    model, noiser = Denoiser(data.shape[1], config.hidden_dim).to(device), Noiser(NoiseSchedule(), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    (context, scaler), dropout = autocast(device, config.amp), config.label_dropout
    generator = torch.Generator(device).manual_seed(config.seed)

    def epoch() -> None:
        total = torch.zeros((), device=device)
        for rows in torch.randperm(len(data)).to(device).split(config.batch_size):
            with context:
                loss = denoising_loss(model, noiser, data[rows], labels[rows], model.null_label, dropout, generator)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach()
        float(total)  # waits for the device

    return epoch


def encode(bench: Bench) -> None:
    """Ray Data's decoding and encoding against one process with one thread, both per core used."""
    from ldm_ray.distributed.cluster import connected, resources
    from ldm_ray.distributed.encode import BLOCK_ROWS, run
    from ldm_ray.distributed.gpus import shared_out

    source, autoencoder = bench.source(), load_autoencoder(bench.ae_ckpt)
    with connected():
        share = shared_out(None, None, None, "--gpus-per-worker")
        count = min(share.room(), -(-len(source) // BLOCK_ROWS))
        ray = partial(timed, partial(run, source, autoencoder, count, share, "latents"), 1, warm=0)
        bare = partial(timed, partial(bare_encode, source, autoencoder, bool(share)), 1, warm=0)
        ray()  # Ray's first job also starts its worker processes
        torch.set_num_threads(1)
        ways = {"bare": lambda: len(source) / bare(), "ray data": lambda: len(source) / ray() / count}
        rates = in_turn(ways, bench.repeats)
        torch.set_num_threads(resources()[0])
    show(f"encode, {count} workers", rates, f"images/s per {'GPU' if share else 'core'}")


def bare_encode(source: ImageSource, autoencoder: checkpoint.AutoencoderCheckpoint, gpu: bool) -> Tensor:
    device, made = "cuda" if gpu else "cpu", []
    for batch in source.table.to_batches(max_chunksize=2048):
        images = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in batch["image"].to_pylist()]
        pixels = to_float(torch.from_numpy(np.stack(images))[:, None].to(device))
        made.append(autoencoder.codec.to(device).encode(pixels).cpu())
    return torch.cat(made)


def train(bench: Bench) -> None:
    """The command from start to exit, with encoding, and what of it the epochs are."""
    runs = [bench.train() for _ in range(bench.repeats)]
    wall = statistics.median(seconds for seconds, _ in runs)
    print(f"train\n  {bench.epochs} epochs, start to exit {wall:>12.2f} s", flush=True)
    if bench.epochs > 1:
        epoch = statistics.median(epoch_seconds(lines) for _, lines in runs)
        print(f"  a whole epoch           {epoch:>12.2f} s; {wall - bench.epochs * epoch:.1f} s besides the epochs")


def autoencoder(bench: Bench) -> None:
    """Steps of 128 images, without Ray, on real images."""
    device = pick_device(None)
    table = bench.source().table.slice(0, 4096)
    pixels = torch.from_numpy(np.stack([decode_png(row["bytes"]) for row in table["image"].to_pylist()]))[:, None]
    labels = torch.tensor(table["label"].to_pylist())

    def rate(model: str, amp: bool) -> float:
        config = AutoencoderConfig(model=model, amp=amp, epochs=1000)
        task = build_task(config, device, None)
        fitter = Fitter(task, task.model, config, pixels, labels, len(pixels), 0, 1, device)
        batches = fitter.order().to(fitter.data.device).split(fitter.batch)[:10]
        seconds = timed(lambda: sum(fitter.train_step(rows) for rows in batches).item(), 5)  # type: ignore[union-attr]
        return len(batches) * fitter.batch / seconds

    for model in registry.REGISTRY:
        ways = {"fp32": partial(rate, model, False), "amp": partial(rate, model, True)}
        show(f"autoencoder {model}", in_turn(ways, bench.repeats), "images/s")


def infer(bench: Bench) -> None:
    """With T = 2 there is next to no sampling: what is left is the cold start."""
    ways = {"import torch": partial(bench.command, "import torch", "torch"), "cold start": partial(bench.infer, 2)}
    show("infer", in_turn(ways | {"64 images, T = 1000": partial(bench.infer, 1000)}, bench.repeats), "s")


def memory(bench: Bench) -> None:
    """Peak resident memory of the command's own process; Ray's worker processes are not in it."""
    _ = bench.command("import torch", "torch"), bench.infer(2), bench.train()
    base = max(bench.peaks["import torch"])
    print("memory")
    for name, values in bench.peaks.items():
        print(f"  {name:<24}{max(values):>12,.0f} MiB  {max(values) / base:.2f} × import torch")


PARTS: dict[str, Any] = {part.__name__: part for part in (loop, encode, train, autoencoder, infer, memory)}


def timed(work: Callable[[], object], times: int, warm: int = 1) -> float:
    """Median seconds of some calls, after ``warm`` that do not count."""
    moments = [time.perf_counter()]
    for _ in range(warm + times):
        work()
        moments.append(time.perf_counter())
    return statistics.median(after - before for before, after in itertools.pairwise(moments[warm:]))


def in_turn(ways: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Each way's figures; one round measures every way once, so that slow moments hit all alike."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, measure in ways.items():
            found[name].append(measure())
    return found


def show(title: str, figures: dict[str, list[float]], unit: str) -> None:
    """A line for each way, with its ratio to the first."""
    first, base = next(iter(figures.items()))
    print(title)
    for name, values in figures.items():
        ratios, middle = sorted(map(truediv, values, base)), statistics.median(values)
        line = f"  {name:<24}{middle:>12,.{0 if middle > 100 else 2}f} {unit}"
        if name != first:
            line += f"  {statistics.median(ratios):.2f} × {first} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
        print(line, flush=True)


def jsonl(file: AnyPath) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def epoch_seconds(metrics: list[dict[str, Any]]) -> float:
    """Median time from one epoch's record to the next; needs two epochs."""
    return statistics.median(after["time"] - before["time"] for before, after in itertools.pairwise(metrics))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="as for ldm_ray.train [digits]")
    parser.add_argument("--ae-ckpt", type=Path, help="autoencoder checkpoint [an MLP with random weights]")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--repeats", type=int, default=3, help="rounds [3]")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of a loop or train measurement [3]")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="ldm-ray-bench-") as folder:
        ckpt = given.ae_ckpt or Path(folder) / "autoencoder.pt"
        if not given.ae_ckpt:
            checkpoint.write(ckpt, checkpoint.autoencoder_content(registry.build("mlp", 16), "mlp", {}))
        dataset = str(Path(given.dataset).absolute()) if Path(given.dataset).is_dir() else given.dataset
        bench = Bench(dataset, ckpt.absolute(), Path(folder), given.repeats, given.epochs)
        print(f"{os.cpu_count()} cores, {torch.cuda.device_count()} GPUs, torch {torch.__version__}", flush=True)
        for name in given.only:
            PARTS[name](bench)


if __name__ == "__main__":
    main()
