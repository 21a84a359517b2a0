"""Checkpoints side by side, in latents or in pixels: size, work, speed, memory, quality.

Each one's speed and memory are measured in a process of its own, so that no one's memory counts for another.
B images at a time, S steps.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm_ray.checkpoints.checkpoint import DiffusionCheckpoint, embed
from ldm_ray.checkpoints.choose import load
from ldm_ray.diffusion.samplers import denoiser_rows, plan_of
from ldm_ray.engine.generator import Generator
from ldm_ray.files.paths import AnyPath
from ldm_ray.models.unet import UNet
from ldm_ray.settings.sampling import SamplingConfig
from ldm_ray.settings.training import TrainConfig
from ldm_ray.training.fitter import Fitter
from ldm_ray.training.tasks import build_task

TRAIN_STEPS, WARM_UP = 10, 3
log = logging.getLogger(__name__)


def facts(loaded: DiffusionCheckpoint, sampling: SamplingConfig) -> dict[str, Any]:
    """What follows from a checkpoint alone. Operations are those of matrices and convolutions, a multiplication and
    an addition being two."""
    generator = Generator.of(loaded)
    args = loaded.args
    plan = plan_of(loaded.schedule, sampling, loaded.prediction_type)
    passes = denoiser_rows(plan, sampling.guidance_scale)
    dim = generator.codec.latent_dim
    xt, t, labels = torch.zeros(1, dim), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    step = operations(lambda: generator.denoiser(xt, t, labels))
    decode = operations(lambda: generator.codec.decode(xt))
    trained = loaded.info.get("train_seconds")
    first = loaded.autoencoder.info.get("train_seconds") if loaded.autoencoder else 0.0
    return {
        "space": "pixel" if loaded.autoencoder is None else "latent",
        "denoiser": "U-Net" if isinstance(loaded.denoiser, UNet) else "MLP",
        "autoencoder": generator.codec.kind if loaded.autoencoder else None,
        "diffused_numbers": dim,
        "parameters": sum(p.numel() for p in loaded.denoiser.parameters()),
        "autoencoder_parameters": sum(p.numel() for p in generator.codec.parameters()),
        "steps": len(plan),
        "operations_per_step": step,
        "operations_per_image": passes * step + decode,
        "epochs": loaded.info.get("epoch"),
        "train_seconds": trained,
        "train_seconds_autoencoder": first,
        "seconds_per_epoch": trained / loaded.info["epoch"] if trained and loaded.info.get("epoch") else None,
        "batch_size": args.get("batch_size"),
    }


@torch.no_grad()
def operations(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def sampling_speed(path: AnyPath, device: str, sampling: SamplingConfig, sizes: Sequence[int], repeats: int) -> dict:
    """``ms_per_image`` at each number of images, to uint8, and ``sampling_mb``, the process at most."""
    generator = Generator.of(load(path, search=[path.parent]), device)
    milliseconds = {}
    for size in sizes:
        labels = [i % generator.num_classes for i in range(size)]
        took = []
        for _ in range(repeats + 1):  # the first warms up
            started = time.perf_counter()
            generator(range(size), labels, sampling)
            took.append(time.perf_counter() - started)
        milliseconds[str(size)] = 1e3 * statistics.median(took[1:]) / size
    return {"ms_per_image": milliseconds, "sampling_mb": peak_mb(device)}


def training_speed(path: AnyPath, device: str) -> dict[str, Any]:
    """``train_images_per_s`` with the checkpoint's own settings, and ``training_mb``, the process at most."""
    torch.set_flush_denormal(True)
    loaded, place = load(path, search=[path.parent]), torch.device(device)
    assert loaded.codec is not None
    settings = {key: value for key, value in loaded.info["config"].items() if key in TrainConfig.__dataclass_fields__}
    config = TrainConfig(**settings)
    shape = {"image_size": list(loaded.codec.image_size), "class_names": list(loaded.class_names)}
    task = build_task(config, place, embed(loaded.autoencoder) if loaded.autoencoder else None, shape)
    rows = TRAIN_STEPS * config.batch_size
    data, labels = torch.randn(rows, loaded.codec.latent_dim), torch.arange(rows) % len(loaded.class_names)
    fitter = Fitter(task, task.model, config, data, labels, rows, 0, 1, place)
    took = []
    for batch in torch.arange(rows, device=fitter.data.device).split(config.batch_size):
        started = time.perf_counter()
        float(fitter.train_step(batch))
        took.append(time.perf_counter() - started)
    speed = config.batch_size / statistics.median(took[WARM_UP:])
    return {"train_images_per_s": speed, "training_mb": peak_mb(device)}


def peak_mb(device: str) -> float:
    """Most memory that this process ever had, PyTorch included; on a GPU, what was taken there."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    if sys.platform == "linux":  # where ru_maxrss of a child begins with its parent's
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def apart(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What ``work`` returns, from a fresh process. RuntimeError when it ended without an answer."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(work, arguments)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a column for each checkpoint."""
    lines = [["", *(row["name"] for row in rows)], ["---"] * (1 + len(rows))]
    for heading, cell_of in LINES.items():
        lines.append([heading, *(cell_of(row) for row in rows)])
    for size in rows[0]["ms_per_image"]:
        lines.append([f"ms per image, {int(size):,} at a time", *(f"{row['ms_per_image'][size]:.3g}" for row in rows)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, form: str = ",.0f") -> str:
    return "–" if value is None else format(value, form)


def figure(row: dict[str, Any], name: str, form: str) -> str:
    """A figure of the samples with its spread over the sampling seeds, if there are several."""
    if "quality" not in row:
        return "–"
    spread = row["quality"]["sd"][name]
    return format(row["quality"]["mean"][name], form) + (f" ± {spread:{form}}" if spread is not None else "")


def total_seconds(row: dict[str, Any]) -> float | None:
    parts = row["train_seconds"], row["train_seconds_autoencoder"]
    return None if None in parts else sum(parts)


LINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "diffused": lambda row: f"{row['diffused_numbers']:,} {'pixels' if row['space'] == 'pixel' else 'latent numbers'}",
    "denoiser": lambda row: f"{row['denoiser']}, {row['parameters']:,} parameters",
    "autoencoder": lambda row: (
        f"{row['autoencoder']}, {row['autoencoder_parameters']:,} parameters" if row["autoencoder"] else "none"
    ),
    "operations per image": lambda row: f"{row['operations_per_image'] / 1e6:,.1f} M, {row['steps']} steps",
    "epochs": lambda row: number(row["epochs"]),
    "training, seconds per epoch": lambda row: number(row["seconds_per_epoch"], ",.1f"),
    "training, seconds in all": lambda row: number(row["train_seconds"]),
    "the same with the autoencoder's": lambda row: number(total_seconds(row)),
    "training, images/s now": lambda row: number(row["train_images_per_s"]),
    "training process at most, MB": lambda row: number(row["training_mb"]),
    "sampling process at most, MB": lambda row: number(row["sampling_mb"]),
    "FD-LeNet ↓": lambda row: figure(row, "fd_lenet", ".2f"),
    "its floor": lambda row: number(row.get("floor"), ".2f"),
    "accuracy ↑": lambda row: figure(row, "accuracy", ".4f"),
    "recall ↑": lambda row: figure(row, "recall", ".3f"),
}


def names_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Space and epochs; with a number where that is the same for several."""
    short = [
        row["space"] + (f", {row['epochs']} epoch{'s'[: row['epochs'] != 1]}" if row["epochs"] else "") for row in rows
    ]
    return [f"{name} ({short[: i + 1].count(name)})" if short.count(name) > 1 else name for i, name in enumerate(short)]


def to_json(results: dict[str, Any]) -> bytes:
    return (json.dumps(results, indent=1, default=str) + "\n").encode()
