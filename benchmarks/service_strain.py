"""The service under strain: more than it can do, clients that vanish, and the same seeds in company.

  python benchmarks/service_strain.py --ckpt latest.pt

One local Ray. For a minute requests arrive at five times the rate that the service finishes, while the memory of the
replica is watched; after it the time until a single image is answered as fast as before. First they are all alike,
then of very different lengths. Then 200 seeds alone and again among random requests: the same bytes. Then clients
that drop their connection: the steps that went on.
"""

import argparse
import asyncio
import hashlib
import io
import json
import random
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

import psutil
from service import PORT, Connection, closed_loop, open_loop, percentiles, post, start

SIZE = 64
STEPS = 100


def heavy(i: int) -> bytes:
    return post({"n": SIZE, "seed": SIZE * i, "num_inference_steps": STEPS, "prompt": "8"})


def mixed(i: int) -> bytes:
    """Requests of very different lengths, half of them of the default steps."""
    n, steps = ((SIZE, 8), (16, 1000), (SIZE, 8), (SIZE, STEPS))[i % 4]
    return post({"n": n, "seed": SIZE * i, "sampler": "ddim", "num_inference_steps": steps, "prompt": "8"})


def memory() -> float:
    """MB of the replicas."""
    found = [
        each
        for each in psutil.process_iter(["cmdline"])
        if "ServeReplica:images" in " ".join(each.info["cmdline"] or [])
    ]
    return sum(each.memory_info().rss for each in found) / 1e6


def metric(name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))


async def single() -> float:
    """ms of one image for a new client."""
    connection, started = Connection(), time.perf_counter()
    await connection.open()
    assert await connection.ask(post({"prompt": "1"})) == 200
    connection.writer.close()
    return (time.perf_counter() - started) * 1e3


async def overload(seconds: float, heavy: Callable[[int], bytes], told: str) -> None:
    usual = percentiles([await single() / 1e3 for _ in range(50)])[0]
    rate, _, _ = await closed_loop(heavy, 4, 5)
    print(f"capacity {rate:.1f} requests/s of {told}; a single image takes {usual:.0f} ms")
    watched: list[float] = []

    async def watch() -> None:
        while True:
            watched.append(await asyncio.to_thread(memory))
            await asyncio.sleep(1)

    watcher = asyncio.create_task(watch())
    statuses, p50, p99 = await open_loop(heavy, 5 * rate, seconds)
    ended = time.perf_counter()
    watcher.cancel()
    while await single() > 2 * usual:
        await asyncio.sleep(0.05)
    after = time.perf_counter() - ended
    third = max(1, len(watched) // 3)
    print(
        f"5 x overload for {seconds:.0f} s: {dict(statuses)}, of the 200s p50 {p50 / 1e3:.1f} s, p99 {p99 / 1e3:.1f} s"
    )
    print(f"replica's memory, first third {max(watched[:third]):.0f} MB, last third {max(watched[-third:]):.0f} MB")
    print(f"after the last answer, a single image at most twice as long as before: {after:.2f} s", flush=True)


async def same_bytes(count: int) -> None:
    address = f"http://127.0.0.1:{PORT}/v1/images/generations"

    def ask(seeds: list[int]) -> list[str]:
        body = {"seeds": seeds, "n": len(seeds), "class_label": [seed % 10 for seed in seeds], "guidance_scale": 1.5}
        head = {"Content-Type": "application/json", "Accept": "application/zip"}
        request = urllib.request.Request(address, json.dumps(body).encode(), head)
        with urllib.request.urlopen(request) as answer, zipfile.ZipFile(io.BytesIO(answer.read())) as file:
            names = sorted(name for name in file.namelist() if name.endswith(".png"))
            return [hashlib.sha256(file.read(name)).hexdigest() for name in names]

    dice = random.Random(0)
    alone = {seed: (await asyncio.to_thread(ask, [seed]))[0] for seed in range(count)}
    order, company = list(range(count)), []
    dice.shuffle(order)
    while order:
        company.append([order.pop() for _ in range(min(len(order), dice.randint(1, 40)))])
    noise = asyncio.create_task(closed_loop(heavy, 3, 5))
    found = await asyncio.gather(*(asyncio.to_thread(ask, seeds) for seeds in company))
    await noise
    pairs = [pair for seeds, made in zip(company, found, strict=True) for pair in zip(seeds, made, strict=True)]
    equal = sum(alone[seed] == made for seed, made in pairs)
    print(f"{equal} of {count} seeds have the same PNG alone and in company of {len(company)} requests and others")


async def dropped(count: int) -> None:
    before, connections = metric("ldm_steps_total"), []
    for _ in range(count):
        connection = Connection()
        await connection.open()
        connection.writer.write(post({"n": 16, "sampler": "ddpm", "prompt": "1"}))
        connections.append(connection)
    while not metric("ldm_images_live"):
        await asyncio.sleep(0.01)
    for connection in connections:
        connection.writer.close()
    at, ended = metric("ldm_steps_total"), time.perf_counter()
    while metric("ldm_images_live"):
        await asyncio.sleep(0.01)
    took, steps = time.perf_counter() - ended, metric("ldm_steps_total")
    print(f"{count} clients dropped: idle after {took:.2f} s, {steps - at:,.0f} image-steps after the last drop")
    print(f"of the {count * 16 * 1000:,} image-steps asked for {steps - before:,.0f} were taken")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="denoiser checkpoint that carries its autoencoder")
    parser.add_argument("--seconds", type=float, default=60, help="of overload [60]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        process = start(given.ckpt, Path(folder))
        try:
            asyncio.run(overload(given.seconds, heavy, f"{SIZE} images and {STEPS} steps"))
            asyncio.run(overload(given.seconds, mixed, "8 to 1,000 steps"))
            asyncio.run(same_bytes(200))
            asyncio.run(dropped(100))
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
