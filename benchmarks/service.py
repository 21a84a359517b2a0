"""The service under load, next to the generator in-process and to an empty Serve deployment.

  python benchmarks/service.py --ckpt latest.pt
  python benchmarks/service.py --ckpt latest.pt --seconds 10 --rates 50 100 200

One local Ray; client, proxy and replicas share the machine. Three parts: 64-image requests, saturated, against the
generator in this process; single-image requests over 32 connections against a deployment that does nothing, and one
that only reads the bodies of the same requests; and an open loop, where requests arrive at a fixed rate whether or
not the ones before have been answered, so that a stall counts in every request that it holds up. Ways of a part are
measured in turn; figures are medians.
RAY_SERVE_ENABLE_HA_PROXY=1 in the environment measures with HAProxy.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ldm_ray.engine.generator import Generator

ROOT = Path(__file__).resolve().parents[1]
PORT = 8765


class Connection:
    """HTTP/1.1 over one kept-alive connection, with as little work as can be."""

    async def open(self) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", PORT, limit=1 << 24)

    async def ask(self, request: bytes) -> int:
        """The status of the answer, which is read to its end."""
        self.writer.write(request)
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head[9:12])
        if b"chunked" in head:
            while (size := int(await self.reader.readline(), 16)) > 0:
                await self.reader.readexactly(size + 2)
            await self.reader.readline()
        else:
            length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            await self.reader.readexactly(length)
        return status


def post(body: dict[str, object], path: str = "/v1/images/generations") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def closed_loop(request: Callable[[int], bytes], connections: int, seconds: float) -> tuple[float, float, float]:
    """(requests per second, median and 99th percentile of the latency in ms) with every connection always busy."""
    ends, taken, count = time.perf_counter() + seconds, [], 0

    async def one() -> None:
        nonlocal count
        connection = Connection()
        await connection.open()
        while time.perf_counter() < ends:
            count += 1
            started = time.perf_counter()
            status = await connection.ask(request(count))
            assert status == 200, status
            taken.append(time.perf_counter() - started)
        connection.writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(connections)))
    return len(taken) / (time.perf_counter() - started), *percentiles(taken)


async def open_loop(request: Callable[[int], bytes], rate: float, seconds: float) -> tuple[Counter, float, float]:
    """(statuses, median and 99th percentile of the latency in ms of the 200s) at a fixed rate of arrival."""
    free: list[Connection] = []
    statuses: Counter = Counter()
    taken: list[float] = []

    async def one(i: int, due: float) -> None:
        connection = free.pop() if free else Connection()
        if not hasattr(connection, "reader"):
            await connection.open()
        status = await connection.ask(request(i))
        statuses[status] += 1
        if status == 200:
            taken.append(time.perf_counter() - due)
        free.append(connection)

    start, tasks = time.perf_counter(), []
    for i in range(int(rate * seconds)):
        due = start + i / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(i, due)))
    await asyncio.gather(*tasks)
    return statuses, *percentiles(taken)


def percentiles(seconds: list[float]) -> tuple[float, float]:
    ordered = sorted(seconds) or [0.0]
    return statistics.median(ordered) * 1e3, ordered[int(0.99 * (len(ordered) - 1))] * 1e3


def in_process(generator: Generator, count: int, seconds: float) -> float:
    """Images per second."""
    labels, made, started = [i % 10 for i in range(count)], 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        generator(range(count), labels)
        made += count
    return made / (time.perf_counter() - started)


def start(ckpt: Path, folder: Path) -> subprocess.Popen:
    """``serve run`` of the service and of an empty deployment, until both answer."""
    service = {"name": "images", "route_prefix": "/", "import_path": "serve.app:deployment"}
    service["args"] = {"ckpt": str(ckpt.absolute()), "outdir": str(folder), "max_images": 65536}  # type: ignore[assignment]
    empty = {"name": "empty", "route_prefix": "/empty", "import_path": "baselines:empty"}
    reading = {"name": "reading", "route_prefix": "/reading", "import_path": "baselines:reading"}
    each = {"name": "each", "route_prefix": "/each", "import_path": "baselines:one_by_one"}
    each["args"] = {"ckpt": str(ckpt.absolute())}  # type: ignore[assignment]
    config = {"http_options": {"host": "127.0.0.1", "port": PORT}, "applications": [service, empty, reading, each]}
    (folder / "config.json").write_text(json.dumps(config))
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(folder / "config.json")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    async def answers() -> bool:
        paths = ("empty", "reading", "each?seed=1")
        baselines = [f"GET /{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for path in paths]
        try:
            for request in (post({"prompt": "1"}), *baselines):
                connection = Connection()
                await connection.open()
                if await connection.ask(request) != 200:
                    return False
            return True
        except (OSError, asyncio.IncompleteReadError):
            return False

    for _ in range(120):
        if asyncio.run(answers()):
            return process
        if process.poll() is not None:
            break
        time.sleep(0.5)
    process.terminate()
    process.wait()
    raise SystemExit((folder / "log").read_text()[-2000:])


def measure(given: argparse.Namespace) -> None:
    generator = Generator.open(given.ckpt)
    in_process(generator, 64, 1)

    def many(i: int) -> bytes:
        return post({"n": 64, "seed": 64 * i, "class_label": [k % 10 for k in range(64)]})

    def single(i: int) -> bytes:
        return post({"seed": i, "class_label": i % 10})

    def nothing(i: int) -> bytes:
        return b"GET /empty HTTP/1.1\r\nHost: x\r\n\r\n"

    def body_alone(i: int) -> bytes:
        return post({"seed": i, "class_label": i % 10}, "/reading")

    def alone(i: int) -> bytes:
        return f"GET /each?seed={i} HTTP/1.1\r\nHost: x\r\n\r\n".encode()

    names = ("generator", "http64", "empty", "reading", "each", "single")
    rounds: dict[str, list[float]] = {name: [] for name in names}
    late: dict[str, tuple[float, float]] = {}
    for _ in range(given.repeats):
        rounds["generator"].append(in_process(generator, 64, given.seconds))
        ways = [("http64", many, 4), ("empty", nothing, 32), ("reading", body_alone, 32)]
        ways += [("each", alone, 32), ("single", single, 32)]
        for name, request, connections in ways:
            rate, *late[name] = asyncio.run(closed_loop(request, connections, given.seconds))  # type: ignore[assignment]
            rounds[name].append(rate * (64 if name == "http64" else 1))
    middle = {name: statistics.median(values) for name, values in rounds.items()}
    shares = [a / b for a, b in zip(rounds["http64"], rounds["generator"], strict=True)]
    print(f"generator in-process, 64 at a time   {middle['generator']:8,.0f} images/s")
    print(f"HTTP, 64-image requests, 4 at a time {middle['http64']:8,.0f} images/s  {spread(shares)} × the generator")
    for name, told in (
        ("empty", "empty deployment, 32 connections   "),
        ("reading", "one that reads its requests' bodies"),
        ("each", "one request a batch, 32 connections"),
        ("single", "single images, 32 connections      "),
    ):
        more = ""
        if name == "single":
            for other, called in (("empty", "the empty one"), ("reading", "the reading one")):
                shares = [a / b for a, b in zip(rounds["single"], rounds[other], strict=True)]
                more += f"  {spread(shares)} × {called}"
        p50, p99 = late[name]
        print(f"{told}  {middle[name]:8,.0f} requests/s  p50 {p50:.0f} ms, p99 {p99:.0f} ms{more}")
    for rate in given.rates:
        statuses, p50, p99 = asyncio.run(open_loop(single, rate, given.seconds))
        print(f"open loop, {rate:5.0f} requests/s  p50 {p50:.0f} ms, p99 {p99:.0f} ms, {dict(statuses)}", flush=True)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="denoiser checkpoint that carries its autoencoder")
    parser.add_argument("--seconds", type=float, default=4, help="each measurement [4]")
    parser.add_argument("--repeats", type=int, default=3, help="rounds [3]")
    parser.add_argument("--rates", type=float, nargs="*", default=[20, 50, 100], help="of the open loop [20 50 100]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        process = start(given.ckpt, Path(folder))
        try:
            measure(given)
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
