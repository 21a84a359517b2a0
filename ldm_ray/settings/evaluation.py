"""The settings of the commands that measure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.limits import MAX_GUIDANCE, MAX_SEED
from ldm_ray.settings.lists import listed, seeds_in
from ldm_ray.settings.options import Config, option
from ldm_ray.settings.sampling import GUIDANCE_SCALE, SamplerConfig, SamplingConfig
from ldm_ray.settings.shared import CACHE_HELP, DATASET_HELP, ModelConfig, device_option


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelConfig, SamplerConfig):
    """``python -m ldm_ray.evaluate``"""

    dataset: str | None = option(None, f"real images to compare with [those it was trained on]: {DATASET_HELP}")
    cache_dir: str | None = option(None, CACHE_HELP)
    outdir: str | None = option(
        None, "where to look for checkpoints and to keep measured floors [$SCRATCH, else ./outputs]"
    )
    output: str = option("evaluation", "folder for metrics.json and samples.png")
    samples: int = option(10_000, "images for each sampling seed, as many of each digit", low=10, high=1_000_000)
    seeds: str = option("0,1,2", "sampling seeds, for the spread: image i of sampling seed s has seed s·samples + i")
    guidance_scale: str = option(
        f"{GUIDANCE_SCALE:g}", "classifier-free guidance, 1 = off; several (1,1.5,2) are measured in turn"
    )
    device: str | None = device_option()
    baselines: bool = option(True, "also measure Gaussian mixtures fitted to the latents (about a minute)")
    ddpm_floor: bool = option(False, "also measure DDPM with every timestep of the same weights (slow)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scales()
        last = (max(self.sampling_seeds()) + 1) * self.samples - 1
        if last > MAX_SEED:
            raise ConfigError(f"--seeds {self.seeds} with --samples {self.samples} goes beyond image seed {MAX_SEED}")

    def sampling_seeds(self) -> list[int]:
        return seeds_in(self.seeds)

    def scales(self) -> list[float]:
        return listed("--guidance-scale", self.guidance_scale, r"\d{1,3}(\.\d{1,6})?", MAX_GUIDANCE)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(SamplingConfig):
    """``python -m ldm_ray.compare``"""

    ckpt: tuple[str, ...] | None = option(
        None, "denoiser checkpoints, in latents or in pixels [the newest of each]", many=8
    )
    dataset: str | None = option(None, f"real images to compare with [those they were trained on]: {DATASET_HELP}")
    cache_dir: str | None = option(None, CACHE_HELP)
    outdir: str | None = option(
        None, "where to look for checkpoints and to keep measured floors [$SCRATCH, else ./outputs]"
    )
    output: str = option("comparison", "folder for comparison.md, comparison.json and comparison.png")
    samples: int = option(10_000, "images for the distances, as many of each digit; 0 = measure speed alone", low=0)
    seeds: str = option("0", "sampling seeds, for the spread")
    batches: str = option("1,64,1024", "numbers of images made at a time, whose times are measured")
    repeats: int = option(3, "times that each of them is made; the median counts", low=1, high=1000)
    device: str | None = device_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sizes()
        if 0 < self.samples < 10:
            raise ConfigError(f"--samples is 0 or at least 10, not {self.samples}")
        if self.samples:
            self.evaluation("")

    def sizes(self) -> list[int]:
        sizes = [int(value) for value in listed("--batches", self.batches, r"\d{1,6}", 100_000)]
        if min(sizes) < 1:
            raise ConfigError(f"--batches are numbers from 1, not {self.batches!r}")
        return sizes

    def evaluation(self, ckpt: str) -> EvaluateConfig:
        """The measurement of one checkpoint's images."""
        shared = ("dataset", "cache_dir", "outdir", "samples", "seeds", "device")
        sampler = {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplerConfig)}
        settings = sampler | {name: getattr(self, name) for name in shared}
        return EvaluateConfig(
            **settings, ckpt=ckpt or None, guidance_scale=f"{self.guidance_scale:.6f}", baselines=False
        )


@dataclass(frozen=True, kw_only=True)
class ClassifiersConfig(Config):
    """``python -m ldm_ray.metrics.train_classifiers``"""

    dataset: str = option("auto", DATASET_HELP)
    cache_dir: str | None = option(None, CACHE_HELP)
    output: str = option("classifiers", "folder for lenet.pt and residual.pt")
    epochs: int | None = option(None, "passes over the training images [20 and 12]", low=1)
    seed: int = option(42, "everything random follows from it", low=0, high=MAX_SEED)
