"""Images per second of the sampling engine, next to what one would otherwise run.

  python benchmarks/sampling.py --ckpt latest.pt
  python benchmarks/sampling.py --ckpt latest.pt --batches 64 1024 --repeats 5

From seeds and labels to uint8 images with one denoiser and decoder. The first way, "loop", is the straightforward
one: the network as it was trained, every timestep, noise for the whole batch at once. Ways of 1000 steps are timed
over ``--timed`` of them and scaled. All ways of a batch size are measured in turn; figures are medians. Needs
diffusers (extra ``dev``) for its row.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pipeline import in_turn, show

from ldm_ray.checkpoints.checkpoint import load_diffusion
from ldm_ray.data.images import to_uint8
from ldm_ray.devices.device import pick_device, settle
from ldm_ray.diffusion.samplers import ddpm, denoiser_rows, dpmpp_2m, plan_of, sample
from ldm_ray.diffusion.timesteps import spaced_timesteps, transitions_of
from ldm_ray.engine.generator import Generator
from ldm_ray.engine.tabled import TabledDenoiser
from ldm_ray.models.denoiser import Denoiser
from ldm_ray.settings.sampling import SamplingConfig

MATRIX_FLOP = 1.065e6  # per image and step with conditioning from tables, hidden width 256; 3.36e6 without


class Ways:
    """Each method makes ``count`` images and returns images per second."""

    def __init__(self, ckpt: Path, ae_ckpt: Path | None, timed: int, device: str | None = None) -> None:
        self.device, self.timed = settle(pick_device(device)), timed
        loaded = load_diffusion(ckpt, ae_ckpt)
        assert loaded.autoencoder is not None
        assert isinstance(loaded.denoiser, Denoiser)
        self.denoiser, self.schedule = loaded.denoiser.to(self.device), loaded.schedule
        self.codec = loaded.autoencoder.codec.to(self.device)
        self.generator = Generator.open(ckpt, self.device, ae_ckpt)
        self.tabled = TabledDenoiser(self.denoiser, self.schedule.num_train_timesteps)

    def labels(self, count: int) -> torch.Tensor:
        return torch.arange(count, device=self.device) % 10

    @torch.inference_mode()
    def loop(self, denoise: Callable[..., torch.Tensor], count: int, planner: Any = ddpm, steps: int = 0) -> float:
        """The whole batch at once, step by step."""
        shape = (count, self.codec.latent_dim)
        timesteps = spaced_timesteps(self.schedule, steps or self.timed, "trailing")
        plan = planner(self.schedule, transitions_of(timesteps))

        def fresh(_: int) -> torch.Tensor:
            return torch.randn(shape, device=self.device)

        def run() -> None:
            *_, (latents, _) = sample(denoise, plan, fresh(0), self.labels(count), fresh)
            to_uint8(self.codec.decode(latents)).cpu()

        return count / self.scaled(run, 1 if steps else self.schedule.num_train_timesteps / self.timed)

    @torch.inference_mode()
    def diffusers(self, count: int) -> float:
        from diffusers import DDPMScheduler

        given = {"beta_start": self.schedule.beta_start, "beta_end": self.schedule.beta_end}
        total = self.schedule.num_train_timesteps
        scheduler: Any = DDPMScheduler(num_train_timesteps=total, clip_sample=False, **given)
        scheduler.set_timesteps(self.timed)

        def run() -> None:
            latents = torch.randn(count, self.codec.latent_dim, device=self.device)
            for t in scheduler.timesteps:
                output = self.denoiser(latents, t.to(self.device).expand(count), self.labels(count))
                latents = scheduler.step(output, t, latents).prev_sample
            to_uint8(self.codec.decode(latents)).cpu()

        return count / self.scaled(run, total / self.timed)

    def engine(self, count: int, scale: float = 1.0, **settings: Any) -> float:
        """``Generator`` as every command uses it."""
        seeds, labels = list(range(count)), [i % 10 for i in range(count)]
        work = partial(self.generator, seeds, labels, SamplingConfig(**settings))
        return count / self.scaled(work, scale)

    def scaled(self, work: Callable[[], object], scale: float) -> float:
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) * scale


def measure(ways: Ways, count: int, repeats: int) -> None:
    thousand = {"sampler": "ddpm", "num_inference_steps": ways.timed, "guidance_scale": 1.0}
    scale = ways.schedule.num_train_timesteps / ways.timed
    table = {
        "loop": lambda: ways.loop(ways.denoiser, count),
        "diffusers DDPM": lambda: ways.diffusers(count),
        "loop, tabled": lambda: ways.loop(ways.tabled, count),
        "ddpm": lambda: ways.engine(count, scale, **thousand),
        "ddpm, bf16": lambda: ways.engine(count, scale, precision="bf16", **thousand),
        "loop, tabled, dpmpp sde 10": lambda: ways.loop(ways.tabled, count, partial(dpmpp_2m, eta=1.0), 10),
        "default, guidance 1": lambda: ways.engine(count, guidance_scale=1.0),
        "default: guidance at the end": lambda: ways.engine(count),
        "default in bf16": lambda: ways.engine(count, precision="bf16"),
        "default, all steps guided": lambda: ways.engine(count, guidance_start=0.0),
        "dpmpp_2m 8": lambda: ways.engine(count, sampler="dpmpp_2m"),
        "unipc 9": lambda: ways.engine(count, sampler="unipc"),
        "ddim 20": lambda: ways.engine(count, sampler="ddim"),
    }
    in_turn(table, 1)  # warms up
    show(f"batch {count:,}", in_turn(table, repeats), "images/s")


def matrix_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of the product that sampling is made of: 4096×256 by 256×256."""
    a, b = torch.randn(4096, 256, device=device, dtype=dtype), torch.randn(256, 256, device=device, dtype=dtype)
    best = 0.0
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 10 * 2 * 4096 * 256 * 256 / (time.perf_counter() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="denoiser checkpoint")
    parser.add_argument("--ae-ckpt", type=Path, help="autoencoder, where the checkpoint carries none")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 1024, 16384], help="[1 64 1024 16384]")
    parser.add_argument("--repeats", type=int, default=3, help="rounds [3]")
    parser.add_argument("--timed", type=int, default=100, help="steps timed of the 1000-step ways [100]")
    given = parser.parse_args()
    ways = Ways(given.ckpt, given.ae_ckpt, given.timed)
    rate = matrix_rate(ways.device)
    plan = plan_of(ways.schedule, SamplingConfig())
    print(
        f"{ways.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {rate / 1e9:,.0f} GFLOP/s fp32"
    )
    floor = rate / (denoiser_rows(plan, SamplingConfig().guidance_scale) * MATRIX_FLOP)
    print(
        f"floor of the default's {len(plan)} steps, matrices of the denoiser alone: {floor:,.0f} images/s", flush=True
    )
    for count in given.batches:
        measure(ways, count, given.repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
