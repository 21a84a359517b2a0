"""Images per second of batch generation to Parquet, next to the generator in-process with PNG encoding.

  python benchmarks/generate.py --ckpt latest.pt
  python benchmarks/generate.py --ckpt latest.pt --images 10000 100000 --workers 1 2 --only encoder scaling

encoder: microseconds and bytes of ways to encode a PNG, alone and in a Parquet file. scaling: the command for each
number of workers and of images, cold start included and once the workers are up, its ratio to as many bare
processes' worth of generator plus PNG encoding (measured before and after each run, in this process, one thread),
and the largest memory of the command and of a worker. resume: running a finished dataset again, and one that lacks
a shard.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from ldm_ray.data.images import SIGNATURE, encode_pngs, png_chunk
from ldm_ray.engine.generator import Generator


def bare(generator: Generator, count: int) -> float:
    """Images per second of one thread: batches of 2,048, each image encoded as PNG."""
    started = time.perf_counter()
    for first in range(0, count, 2048):
        seeds = range(first, min(first + 2048, count))
        encode_pngs(generator(seeds, [seed % 10 for seed in seeds])[:, 0].numpy())
    return count / (time.perf_counter() - started)


def run(ckpt: Path, out: Path, count: int, workers: int, shard: int) -> tuple[str, float, float, float]:
    """(what the command printed, seconds, its largest memory, a worker's; MB of its own pages)."""
    flags = ["--ckpt", ckpt, "--seeds", f"0-{count - 1}", "--outdir", out, "--num-workers", workers]
    flags += ["--shard-size", shard, "--device", "cpu"]
    command = [sys.executable, "-m", "ldm_ray.generate", *map(str, flags)]
    started = time.perf_counter()
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    most, worker = 0.0, 0.0
    while process.poll() is None:
        try:
            top = psutil.Process(process.pid)
            most = max(most, own(top))
            for child in top.children(recursive=True):
                if "MapWorker" in " ".join(child.cmdline()[:1]):
                    worker = max(worker, own(child))
        except psutil.Error:
            pass
        time.sleep(0.25)
    told = process.communicate()[0]
    if process.returncode:
        raise SystemExit(told)
    return told, time.perf_counter() - started, most, worker


def own(process: psutil.Process) -> float:
    found = process.memory_info()
    return (found.rss - getattr(found, "shared", 0)) / 1e6


def scaling(args: argparse.Namespace, folder: Path) -> None:
    generator = Generator.open(args.ckpt)
    bare(generator, 4096)
    print(
        "| images | workers | one bare thread, images/s | workers up | ratio per worker | cold start | seconds | MB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for count in args.images:
        for workers in args.workers:
            out = folder / f"{count}-{workers}"
            before = bare(generator, 10_240)
            told, seconds, most, worker = run(args.ckpt, out, count, workers, min(args.shard_size, count // workers))
            alone = (before + bare(generator, 10_240)) / 2
            found = re.search(r"workers: ([\d,]+) images/s", told)
            up = float(found[1].replace(",", "")) if found else float("nan")
            print(
                f"| {count:,} | {workers} | {alone:,.0f} | {up:,.0f} | {up / alone / workers:.2f} | "
                f"{count / seconds:,.0f} | {seconds:.1f} | {most:.0f} command, {worker:.0f} worker |",
                flush=True,
            )


def resume(args: argparse.Namespace, folder: Path) -> None:
    count, out = args.images[0], folder / "resume"
    size = count // 10
    for what in ("from nothing", "complete", "one of ten shards missing"):
        if what.startswith("one"):
            next((out / "data").glob("train-00004-*")).unlink()
        print(f"{what:<28} {run(args.ckpt, out, count, args.workers[-1], size)[1]:6.1f} s", flush=True)


def encoder(args: argparse.Namespace, folder: Path) -> None:
    generator = Generator.open(args.ckpt)
    images = generator(range(4096), [i % 10 for i in range(4096)])[:, 0].numpy()

    def pillow(level: int) -> Callable[[np.ndarray], list[bytes]]:
        def encode(images: np.ndarray) -> list[bytes]:
            made = []
            for image in images:
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "PNG", compress_level=level)
                made.append(buffer.getvalue())
            return made

        return encode

    def by_zlib(level: int, filter: int) -> Callable[[np.ndarray], list[bytes]]:
        def encode(images: np.ndarray) -> list[bytes]:
            rows = np.zeros((*images.shape[:2], images.shape[2] + 1), dtype=np.uint8)
            rows[:, :, 0], rows[:, :, 1:] = filter, images
            if filter == 1:  # from the left
                rows[:, :, 2:] -= images[:, :, :-1]
            if filter == 2:  # from above
                rows[:, 1:, 1:] -= images[:, :-1]
            start = encode_pngs(images[:1])[0][:33]
            end = png_chunk(b"IEND", b"")
            return [start + png_chunk(b"IDAT", zlib.compress(row.tobytes(), level)) + end for row in rows]

        return encode

    ways: dict[str, Callable[[np.ndarray], list[bytes]]] = {"ours: stored": encode_pngs}
    ways |= {f"Pillow, level {level}": pillow(level) for level in (0, 1, 6, 9)}
    for filter, name in enumerate(("no filter", "from the left", "from above")):
        ways |= {f"zlib level {level}, {name}": by_zlib(level, filter) for level in (1, 6, 9)}
    print("| way | µs per image | bytes per PNG | bytes in Parquet with zstd 3 |\n| --- | --- | --- | --- |")
    for name, encode in ways.items():
        times = []
        for _ in range(3):
            started = time.perf_counter()
            made = encode(images)
            times.append(time.perf_counter() - started)
        assert made[0].startswith(SIGNATURE) and np.array_equal(np.asarray(Image.open(io.BytesIO(made[9]))), images[9])
        buffer = io.BytesIO()
        table = pa.table({"bytes": made})
        pq.write_table(table, buffer, compression="zstd", compression_level=3, use_dictionary=False)
        size = sum(map(len, made)) / len(made)
        print(
            f"| {name} | {min(times) / len(made) * 1e6:.1f} | {size:.0f} | {len(buffer.getvalue()) / len(made):.0f} |"
        )


def main() -> None:
    parts: dict[str, Callable[[argparse.Namespace, Path], None]] = {
        "encoder": encoder,
        "scaling": scaling,
        "resume": resume,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shard-size", type=int, default=10_000)
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts))
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="generate-"))
    try:
        for name in args.only:
            print(f"\n{name}", flush=True)
            parts[name](args, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
