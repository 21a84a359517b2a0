"""Whether a GPU is right, for gpu.py: what it is, its tests, the same bytes in any company."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

import torch
from checkout import ROOT
from gpu_report import Bench
from sampling import matrix_rate

from ldm_ray.devices.device import numerics_of
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.engine.generator import Generator
from ldm_ray.engine.request import ImageRequest
from ldm_ray.engine.slots import Slots
from ldm_ray.models import registry
from ldm_ray.models.codec import LatentCodec, PixelCodec
from ldm_ray.models.denoiser import Denoiser
from ldm_ray.models.unet import UNet
from ldm_ray.settings.sampling import SamplingConfig


def facts(bench: Bench) -> None:
    note, device = bench.report.note, bench.device
    note("device", "kind", device.type)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        note("device", "card", card.name, processors=card.multi_processor_count, memory_mb=card.total_memory // 10**6)
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
        note("device", "driver", asked.stdout.strip() or asked.stderr.strip()[:80])
    note("device", "versions", f"torch {torch.__version__}", **numerics_of(device), python=platform.python_version())
    note("device", "images", len(bench.images), test=len(bench.test))
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for name, dtype in types.items():
        note("device", f"matrices of sampling, {name}", matrix_rate(device, dtype) / 1e9, "GFLOP/s")


def tests(bench: Bench) -> None:
    """Every test marked ``gpu``, in a process of its own; on a CPU rehearsed."""
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in file.read_text()]
    plain = ["--noconftest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "-rfEs"]
    environment, seconds = dict(os.environ), max(90.0, bench.report.left * 0.3)
    if bench.device.type == "cpu":
        plain += ["-p", "tests.helpers.pretend_cuda"]
        environment["OMP_NUM_THREADS"] = "1"
    call = [sys.executable, "-m", "pytest", "-m", "gpu", *plain, *files]
    log = bench.report.output.with_suffix(".tests.txt")
    with log.open("w") as stream:
        process = subprocess.Popen(call, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
        try:
            ended: Any = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            ended = f"cut off after {seconds:.0f} s"
    lines = log.read_text().strip().splitlines() or ["no output"]
    bench.report.note("tests", f"pytest -m gpu: exit {ended}", lines[-1], all_of_it=str(log))
    for line in lines:
        if line.startswith(("FAILED", "ERROR", "SKIPPED")):
            bench.report.note("tests", line[:38], line[38:300])


def company(bench: Bench) -> None:
    """An image's bytes alone, among any others, at another place, and from the slots."""
    makers = {"MLP": latent_generator(bench.device, "mlp"), "Conv": latent_generator(bench.device, "conv")}
    makers["U-Net"] = Generator(UNet(hidden_dim=8), PixelCodec(), NoiseSchedule(), bench.device)
    for name, generator in makers.items():
        most = 40 if name == "U-Net" else 2000 if bench.device.type == "cuda" else 300
        labels = [i % 10 for i in range(most)]
        sampling = SamplingConfig(num_inference_steps=4, guidance_start=0.5)
        whole = generator(range(most), labels, sampling)
        alone = [torch.equal(generator([i], [labels[i]], sampling)[0], whole[i]) for i in range(0, most, most // 8)]
        parts = [
            torch.equal(generator(range(first, first + size), labels[first : first + size], sampling),
                        whole[first : first + size])
            for first, size in ((1, 3), (7, 30), (most // 3, most // 2))
        ]  # fmt: skip
        slots = Slots(generator)
        requests = [ImageRequest(range(i, i + 5), labels[i : i + 5], sampling) for i in range(0, 40, 5)]
        jobs = [slots.submit(request) for request in requests]
        slots.close(drain_s=60)
        slotted = [torch.equal(job.images, whole[5 * i : 5 * i + 5, 0]) for i, job in enumerate(jobs)]
        same = all(alone) and all(parts) and all(slotted)
        told: dict[str, Any] = {"alone": sum(alone), "parts": sum(parts), "slots": sum(slotted)}
        sizes = {size: generator.tiles.is_equal(size) for size in generator.tiles.sizes}
        bench.report.note("company", name, "same" if same else "OTHER BYTES", **told, tiles=sizes)


def latent_generator(device: torch.device, kind: str) -> Generator:
    torch.manual_seed(0)
    denoiser = Denoiser()
    with torch.no_grad():
        for weight in denoiser.parameters():
            weight.add_(0.03 * torch.randn_like(weight))
    return Generator(denoiser, LatentCodec(registry.build(kind, 16), kind), NoiseSchedule(), device)
