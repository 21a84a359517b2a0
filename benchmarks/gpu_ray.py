"""The commands on a GPU where Ray is: encode, train, resume, generate, serve. ``gpu.py`` is for what needs no Ray.

  python benchmarks/gpu_ray.py --dataset FOLDER
  python benchmarks/gpu_ray.py --device cpu --epochs 1 --images 2000       a rehearsal

Every step is a command as its user would type it; with RAY_ADDRESS they run on that cluster, whose nodes then must see
``--outdir``. A line is printed and ``--output`` written after every step; one that fails shows its last lines, and
those that do not need it go on. The service's images are compared with those of ``infer``'s generator on this device.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from checkout import ROOT
from gpu_report import Report

from ldm_ray.checkpoints.runs import newest_diffusion
from ldm_ray.devices.device import pick_device
from ldm_ray.engine.generator import Generator

REQUESTS, SIDE_BY_SIDE, EACH = 200, 16, 16
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass
class Steps:
    report: Report
    dataset: str
    outdir: Path
    device: str
    epochs: int
    images: int

    def command(self, module: str, *flags: object) -> tuple[float, str]:
        """(seconds, output) of a command. RuntimeError with its last lines when it fails or takes too long."""
        call = [sys.executable, "-m", f"ldm_ray.{module}", *map(str, flags), "--device", self.device]
        started = time.perf_counter()
        done = subprocess.run(
            call,
            cwd=self.outdir,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(60.0, self.report.left),
        )
        if done.returncode:
            raise RuntimeError(f"exit {done.returncode}: {' | '.join(done.stdout.strip().splitlines()[-4:])}")
        return time.perf_counter() - started, done.stdout

    def train(self, module: str, name: str, *flags: object) -> None:
        """A run from start to exit: Ray Data's encoding, Ray Train's epochs."""
        where = "--dataset", self.dataset, "--outdir", self.outdir
        seconds, output = self.command(module, *where, *flags)
        for line in output.splitlines():
            if " written to " in line or "reused from" in line:
                self.report.note("encode", name, " ".join(line.replace(str(self.outdir), "").split())[-90:])
        run = max((self.outdir / "runs").glob("*/metrics.jsonl"), key=lambda file: file.stat().st_mtime)
        lines = [json.loads(line) for line in run.read_text().splitlines()]
        rate = max(line["images_per_s"] for line in lines)
        self.report.note(
            "train", name, rate, "images/s", epochs=len(lines), val_loss=lines[-1]["val_loss"], start_to_exit_s=seconds
        )

    def autoencoder(self) -> None:
        kind = "conv" if self.device == "cuda" else "mlp"
        self.train("train_autoencoder", f"{kind} autoencoder", "--model", kind, "--epochs", self.epochs)

    def denoiser(self) -> None:
        self.train("train", "denoiser", "--epochs", self.epochs)

    def resume(self) -> None:
        self.train("train", "denoiser, resumed", "--epochs", self.epochs + 1, "--auto-resume")

    def half_precision(self) -> None:
        self.train("train", "denoiser, bf16", "--epochs", self.epochs, "--amp")

    def generate(self) -> None:
        where = "--ckpt", self.ckpt(), "--seeds", f"0-{self.images - 1}", "--outdir", self.outdir / "made"
        seconds, output = self.command("generate", *where)
        more = {"start_to_exit_s": seconds, "said": output.strip().splitlines()[-1][-80:]}
        self.report.note("generate", f"{self.images:,} images", self.images / seconds, "images/s", **more)

    def serve(self) -> None:
        """One replica: until it is ready, the bytes of some images, requests of 16 images side by side."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = {"ckpt": str(self.ckpt()), "outdir": str(self.outdir), "device": self.device}
        application = {"name": "images", "import_path": "serve.app:deployment", "args": arguments}
        config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
        (self.outdir / "serve.json").write_text(json.dumps(config))
        call = [sys.executable, "-m", "ray.serve.scripts", "run", str(self.outdir / "serve.json")]
        started = time.perf_counter()
        with (self.outdir / "serve.log").open("wb") as log:
            server = subprocess.Popen(call, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)
        try:
            while not ready(port):
                if server.poll() is not None or time.perf_counter() - started > 240:
                    raise RuntimeError((self.outdir / "serve.log").read_text()[-400:])
                time.sleep(0.5)
            self.report.note("serve", "ready", time.perf_counter() - started, "s")
            generator = Generator.open(self.ckpt(), pick_device(self.device))
            wanted = generator(range(40, 40 + EACH), [7] * EACH)[:, 0].numpy()
            made = images(port, 40)
            same = made.shape[0] == EACH and np.array_equal(made.reshape(wanted.shape), wanted)
            self.report.note("serve", "its bytes are the generator's", same)
            started = time.perf_counter()
            with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
                list(pool.map(lambda i: images(port, EACH * i), range(REQUESTS)))
            seconds = time.perf_counter() - started
            self.report.note("serve", f"{EACH} images a request", REQUESTS * EACH / seconds, "images/s",
                             requests_per_s=REQUESTS / seconds)  # fmt: skip
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()

    def ckpt(self) -> Any:
        found = newest_diffusion(self.outdir)
        if found is None:
            raise RuntimeError("no denoiser was trained")
        return found


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def images(port: int, seed: int) -> np.ndarray:
    """A request for images of the digit 7."""
    body = json.dumps({"prompt": "7", "n": EACH, "seed": seed}).encode()
    fields = {"content-type": "application/json", "accept": "application/x-npy"}
    if token := os.environ.get("LDM_RAY_TOKEN"):
        fields["authorization"] = f"Bearer {token}"
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/images/generations", body, fields)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return np.load(io.BytesIO(answer.read()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="as for ldm_ray.train [digits]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[cuda]")
    parser.add_argument("--epochs", type=int, default=5, help="of each training [5]")
    parser.add_argument("--images", type=int, default=1_000_000, help="to generate [1,000,000]")
    parser.add_argument("--minutes", type=float, default=15.0, help="no step begins after that [15]")
    parser.add_argument("--outdir", type=Path, help="a folder of all nodes [a temporary one]")
    parser.add_argument("--output", type=Path, default=Path("gpu_ray.json"), help="[gpu_ray.json]")
    given = parser.parse_args()
    report = Report(given.output, given.minutes)
    with tempfile.TemporaryDirectory(prefix="ldm-ray-gpu-") as folder:
        outdir = (given.outdir or Path(folder)).absolute()
        outdir.mkdir(parents=True, exist_ok=True)
        dataset = str(Path(given.dataset).absolute()) if Path(given.dataset).is_dir() else given.dataset
        steps = Steps(report, dataset, outdir, given.device, given.epochs, given.images)
        names: list[tuple[str, Callable[[], None]]] = [
            (step.__name__, step)
            for step in (
                steps.autoencoder, steps.denoiser, steps.resume, steps.half_precision, steps.generate, steps.serve,
            )
        ]  # fmt: skip
        for name, step in names:
            report.attempt(name, "this step", step)
    print(f"written to {given.output}")


if __name__ == "__main__":
    main()
