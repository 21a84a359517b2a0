"""Encoding and training on one and on two workers of one core each.

  python benchmarks/scaling.py --dataset FOLDER --ae-ckpt ae.pt

Encoding: the Ray Data job over the images once and four times over; what the difference takes is the rate of workers
that are up. Training: ``python -m ldm_ray.train`` in processes of its own, whose Ray is told of as many cores as there
are workers; the rate is that of whole epochs after the first, so neither a start nor an encoding is in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa

from ldm_ray.checkpoints.checkpoint import load_autoencoder
from ldm_ray.data.sources import load_source

TIMES = 4
CORES = """
import ray, runpy, sys
started = ray.init
ray.init = lambda **given: started(**given, num_cpus={cores})
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], None, "__main__", True)
"""


def encode(given: argparse.Namespace) -> None:
    from ldm_ray.distributed.cluster import connected
    from ldm_ray.distributed.encode import run
    from ldm_ray.distributed.gpus import Share

    source, autoencoder = load_source(given.dataset, "train", Path("hf_cache")), load_autoencoder(given.ae_ckpt)
    often = dataclasses.replace(source, table=pa.concat_tables([source.table] * TIMES).combine_chunks())
    rates: dict[int, list[float]] = {count: [] for count in given.workers}
    with connected():
        run(source, autoencoder, max(given.workers), Share(), "latents")  # Ray's first job starts its processes
        for _ in range(given.repeats):
            for count in given.workers:
                seconds = []
                for images in (source, often):
                    started = time.perf_counter()
                    run(images, autoencoder, count, Share(), "latents")
                    seconds.append(time.perf_counter() - started)
                rates[count].append((len(often) - len(source)) / (seconds[1] - seconds[0]))
    show("encode", rates)


def train(given: argparse.Namespace) -> None:
    for batch in given.batch_sizes:
        rates: dict[int, list[float]] = {count: [] for count in given.workers}
        for _ in range(given.repeats):
            for count in given.workers:
                rates[count].append(train_rate(given, batch, count))
        show(f"train, {batch} images a step", rates)


def train_rate(given: argparse.Namespace, batch: int, workers: int) -> float:
    """Images/s of all workers together."""
    flags = ["--dataset", given.dataset, "--ae-ckpt", given.ae_ckpt, "--outdir", given.scratch, "--device", "cpu"]
    flags += ["--epochs", given.epochs, "--batch-size", batch, "--num-workers", workers]
    command = [sys.executable, "-c", CORES.format(cores=workers), "ldm_ray.train", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    newest = max((Path(given.scratch) / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime)
    lines = [json.loads(line) for line in (newest / "metrics.jsonl").read_text().splitlines()]
    assert all(line["workers"] == workers for line in lines)
    return statistics.median(line["images_per_s"] for line in lines[1:])


def show(name: str, rates: dict[int, list[float]]) -> None:
    first = min(rates)
    for count, found in rates.items():
        ratios = sorted(a / b for a, b in zip(found, rates[first], strict=True))
        told = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) of {first} worker"
        print(f"{name}, {count} workers: {statistics.median(found):>9,.0f} images/s, {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--ae-ckpt", type=Path, required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 512, 4096])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("encode", "train"))
    given = parser.parse_args()
    given.ae_ckpt = given.ae_ckpt.absolute()
    with tempfile.TemporaryDirectory() as given.scratch:
        if given.only != "train":
            encode(given)
        if given.only != "encode":
            train(given)


if __name__ == "__main__":
    main()
