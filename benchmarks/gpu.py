"""All that is to be known of a GPU in some minutes: whether it is right, then how fast. No Ray, no network.

  python benchmarks/gpu.py                                    8 minutes, the embedded digits
  python benchmarks/gpu.py --dataset FOLDER --minutes 12      real MNIST as a folder of Parquet files
  python benchmarks/gpu.py --device cpu --minutes 1           a rehearsal

In this order: the device and versions; every test marked ``gpu``; the same bytes in any company; training steps and
epochs; the encoder; sampling, the straightforward loop beside it; a full training with its FD-LeNet. A line is
printed and ``--output`` written anew after every figure, so a run that is cut short has what it had. A part that
fails says so, and the next begins. Figures are medians; of sampling in 1000 steps ``--timed`` steps are taken and
scaled. Another way of training or sampling is one more entry of ``TRAINING`` or ``SAMPLING``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  # before anything of the package
import gpu_quality
import torch
from gpu_checks import company, facts, tests
from gpu_report import Bench, Report, memory
from sampling import MATRIX_FLOP, Ways, matrix_rate
from torch import Tensor

from ldm_ray.checkpoints import checkpoint
from ldm_ray.data.images import to_float
from ldm_ray.data.sources import load_source
from ldm_ray.devices.device import pick_device, picked, sent, settle
from ldm_ray.diffusion.samplers import denoiser_rows, plan_of
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.models import registry
from ldm_ray.models.codec import LatentCodec
from ldm_ray.models.denoiser import Denoiser
from ldm_ray.settings.sampling import SamplingConfig
from ldm_ray.settings.training import AutoencoderConfig, RunConfig, TrainConfig
from ldm_ray.training.fitter import Fitter
from ldm_ray.training.tasks import build_task

SIZES = (1, 64, 1024, 65536)
QUALITY = 0.5  # share of the minutes that is kept for the full training
THOUSAND: dict[str, Any] = {"sampler": "ddpm", "guidance_scale": 1.0}

TRAINING: dict[str, RunConfig] = {
    "MLP autoencoder": AutoencoderConfig(model="mlp"),
    "Conv autoencoder": AutoencoderConfig(model="conv"),
    "Conv autoencoder, bf16": AutoencoderConfig(model="conv", amp=True),
    "denoiser": TrainConfig(),
    "denoiser, bf16": TrainConfig(amp=True),
    "denoiser, 4,096 a step": TrainConfig(batch_size=4096),
    "U-Net": TrainConfig(space="pixel"),
    "U-Net, bf16": TrainConfig(space="pixel", amp=True),
}
Way = Callable[[Ways, int], float]  # images per second of so many at a time


def by_engine(settings: SamplingConfig) -> tuple[SamplingConfig, Way]:
    return settings, lambda ways, count: ways.engine(count, **settings.to_dict())


SAMPLING: dict[str, tuple[SamplingConfig, Way]] = {
    "default, 10 steps": by_engine(SamplingConfig()),
    "default, bf16": by_engine(SamplingConfig(precision="bf16")),
    "unipc, 9 steps": by_engine(SamplingConfig(sampler="unipc")),
    "dpmpp_2m, 8 steps": by_engine(SamplingConfig(sampler="dpmpp_2m")),
    "ddim, 20 steps": by_engine(SamplingConfig(sampler="ddim")),
    "ddpm, 1000 steps": (
        SamplingConfig(**THOUSAND),
        lambda ways, count: ways.engine(count, 1000 / ways.timed, num_inference_steps=ways.timed, **THOUSAND),
    ),
    "the straightforward loop, 1000 steps": (
        SamplingConfig(**THOUSAND),
        lambda ways, count: ways.loop(ways.denoiser, count),
    ),
}


def fitter_of(bench: Bench, config: RunConfig) -> Fitter:
    """A fitter over as many rows as the dataset has; those of latents are random."""
    model = registry.build("mlp", 16)
    codec = checkpoint.AutoencoderCheckpoint(codec=LatentCodec(model, "mlp"), path="none", sha256="")
    latent = isinstance(config, TrainConfig) and config.space == "latent"
    task = build_task(config, bench.device, checkpoint.embed(codec) if latent else None)
    count = len(bench.images)
    if latent:
        data = torch.randn(count, 16)
    else:
        data = bench.images if isinstance(config, AutoencoderConfig) else to_float(bench.images).flatten(1) * 2 - 1
    return Fitter(task, task.model, config, data, bench.labels, count, 0, 1, bench.device)


def training(bench: Bench) -> None:
    for name, config in TRAINING.items():

        def measure(name: str = name, config: RunConfig = config) -> None:
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            fitter = fitter_of(bench, config)
            batches = sent(fitter.order(), fitter.data.device).split(fitter.batch)
            step = bench.rate(lambda: fitter.train_step(batches[0]), 1)
            images = step * fitter.batch
            more = {"ms_a_step": 1000 / step, "batch": fitter.batch}
            bench.report.note("training", name, images, "images/s", **more, **memory(bench.device))
            if fitter.steps_per_epoch / step < bench.report.limit * 4:
                started = time.perf_counter()
                fitter.run_epoch(lambda step: False)
                fitter.end_epoch()
                bench.report.note("training", f"{name}: an epoch", time.perf_counter() - started, "s")

        bench.report.attempt("training", name, measure, QUALITY)


def encoder(bench: Bench) -> None:
    """Blocks of 2,048 images, as Ray Data gives them, from the CPU to latents on the CPU."""
    for kind in ("mlp", "conv"):
        codec = LatentCodec(registry.build(kind, 16), kind).to(bench.device)
        rows = torch.arange(min(2048, len(bench.images)))

        def work(codec: LatentCodec = codec, rows: Tensor = rows) -> Tensor:
            return codec.encode(to_float(picked(bench.images, rows, bench.device))).cpu()

        bench.report.note("encoder", kind, bench.rate(work, len(rows)), "images/s")


def sampling(bench: Bench) -> None:
    """From seeds to uint8 images on the CPU, MLP decoder. fraction: of what the denoiser's matrices would allow."""
    torch.manual_seed(0)
    denoiser, model = Denoiser(), registry.build("mlp", 16)
    inside = checkpoint.AutoencoderCheckpoint(codec=LatentCodec(model, "mlp"), path="none", sha256="")
    ckpt = bench.scratch / "latest.pt"
    checkpoint.write(ckpt, checkpoint.diffusion_content(denoiser, denoiser, NoiseSchedule(), inside, {}))
    ways = Ways(ckpt, None, bench.timed, bench.device.type)
    rates = {"fp32": matrix_rate(bench.device), "bf16": matrix_rate(bench.device, torch.bfloat16)}
    for name, (settings, way) in SAMPLING.items():
        rows = denoiser_rows(plan_of(ways.schedule, settings), settings.guidance_scale)
        fastest = rates[settings.precision] / (rows * MATRIX_FLOP)  # images per second
        bench.report.attempt("sampling", name, partial(by_sizes, bench, ways, name, way, fastest), QUALITY)


def by_sizes(bench: Bench, ways: Ways, name: str, way: Way, fastest: float) -> None:
    """Each number of images at a time, as far as the time for a figure goes."""
    seconds, before = 0.0, 0
    for count in SIZES:
        guess = seconds * count / max(before, 64)  # fewer than 64 take as long as those
        if guess > 8 * bench.report.limit:
            bench.report.note("sampling", f"{name}: {count:,}", "left out", why=f"{guess:.0f} s a time")
            return
        started = time.perf_counter()
        way(ways, count)  # compares tiles
        figures = [way(ways, count)]
        seconds, before = (time.perf_counter() - started) / 2, count
        while time.perf_counter() - started < bench.report.limit:
            figures.append(way(ways, count))
        rate = statistics.median(figures)
        more = {"ms": 1000 * count / rate, "fraction": rate / fastest} | memory(bench.device)
        bench.report.note("sampling", f"{name}: {count:,}", rate, "images/s", **more)


def full_training(bench: Bench) -> None:
    gpu_quality.train(bench.report, bench.device, bench.images, bench.labels, bench.test)


PARTS: dict[str, Callable[[Bench], None]] = {
    part.__name__: part for part in (facts, tests, company, training, encoder, sampling, full_training)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="about how long all of it may take [8]")
    parser.add_argument("--dataset", default="digits", help="as for ldm_ray.train [digits]")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="[the best there is]")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="[gpu.json]")
    parser.add_argument("--timed", type=int, default=100, help="steps timed of the 1000-step ways [100]")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--images", type=int, help="of the training split [all]")
    given = parser.parse_args()
    report = Report(given.output, given.minutes)
    device = settle(pick_device(given.device))
    with tempfile.TemporaryDirectory(prefix="ldm-ray-gpu-") as folder:
        train, test = (load_source(given.dataset, split, Path(folder)) for split in ("train", "test"))
        images, labels = train.decode()
        images, labels = images[: given.images], labels[: given.images]
        bench = Bench(report, device, images, labels, test.decode()[0], given.timed, Path(folder))
        for name in given.only:
            report.attempt(name, "this part", partial(PARTS[name], bench))
    print(f"written to {given.output}")


if __name__ == "__main__":
    main()
