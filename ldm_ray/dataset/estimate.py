"""What a request would make, how large it would be and how long it would take, by making a few of its images."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping

import torch

from ldm_ray.checkpoints.checkpoint import DiffusionCheckpoint
from ldm_ray.data.images import encode_pngs
from ldm_ray.dataset.formats import encode
from ldm_ray.dataset.request import Request
from ldm_ray.dataset.shards import Job, Record
from ldm_ray.files.store import Store
from ldm_ray.settings.datasets import GenerateConfig
from ldm_ray.terminal.words import counted

MEASURED = {"cpu": 512, "mps": 512, "cuda": 16_384}


def estimate(
    config: GenerateConfig,
    model: DiffusionCheckpoint,
    request: Request,
    store: Store,
    records: Mapping[int, Record],
    device: str,
) -> str:
    """A few lines; writes nothing. One thread computes, as in a worker."""
    torch.set_num_threads(1)
    few = dataclasses.replace(request, shard_size=min(request.count, MEASURED[device]))
    maker = Job(model, few, store, config.batch_size).maker(device)
    maker.shard(0)  # warms up
    started = time.perf_counter()
    shard = maker.shard(0)
    if request.format == "png":
        size = sum(map(len, encode_pngs(shard.images)))
    else:
        size = len(encode(shard, request.format, request.labels.num_classes, store, request.stem(0)))
    seconds = time.perf_counter() - started
    there = sum(record.rows for record in records.values())
    left, each = request.count - there, seconds / len(shard)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device, cores)
    workers = max(1, min(config.num_workers or most, most, request.num_shards - len(records)))
    sampling, total = request.sampling, request.count * size / len(shard)
    large = f"{total / 1e6:,.1f} MB" if total >= 1e5 else f"{total:,.0f} bytes"
    lines = {
        "would make": f"{counted(request.count, 'image')} in {counted(request.num_shards, 'shard')} "
        f"of up to {request.shard_size:,}, "
        f"as {request.format}, in {store}",
        "there": counted(there, "image") if records else "nothing yet",
        "labels": request.labels.rule,
        "sampler": f"{sampling.sampler}, {sampling.num_inference_steps} steps, guidance {sampling.guidance_scale:g}",
        "size": f"about {large}, {size / len(shard):,.0f} bytes per image",
        "time": f"about {left * each / workers:,.0f} s and the start of Ray, at {1 / each:,.0f} images/s "
        f"on each of {counted(workers, 'worker')} ({device}, measured on {counted(len(shard), 'image')})",
        "request": request.fingerprint,
    }
    return "\n".join(f"{name:<12} {text}" for name, text in lines.items())
