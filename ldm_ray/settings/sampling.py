"""How images are sampled: what every command that makes images shares, and the settings of ``infer``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.limits import MAX_GUIDANCE, MAX_SEED, MAX_STEPS
from ldm_ray.settings.options import Config, option
from ldm_ray.settings.shared import ModelConfig, device_option

DEFAULT_STEPS = {"dpmpp_2m_sde": 10, "unipc": 9, "dpmpp_2m": 8, "ddim": 20, "ddpm": 0}  # 0: every timestep
DEFAULT_STEPS_TEXT = "; ".join(f"{sampler}: {steps or 'T'}" for sampler, steps in DEFAULT_STEPS.items())
SAMPLERS = tuple(DEFAULT_STEPS)
SPACINGS = ("leading", "trailing", "linspace", "logsnr", "karras")
GUIDANCE_SCALE = 2.75  # chosen with its start by measurement: docs/sampling.md


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(Config):
    """How images are sampled, but for guidance: what every command that makes images shares."""

    sampler: str = option(
        "dpmpp_2m_sde",
        "dpmpp_2m_sde (fresh noise in every step), unipc, dpmpp_2m, ddim, or ddpm: the published one, by default over "
        "every timestep",
        choices=SAMPLERS,
    )
    num_inference_steps: int | None = option(
        None,
        f"denoising steps, up to the model's T [{DEFAULT_STEPS_TEXT}]",
        low=1,
    )
    timestep_spacing: str | None = option(None, "which timesteps those are [trailing]", choices=SPACINGS)
    eta: float = option(0.0, "ddim's noise: 0 = none, 1 = as much as ddpm", low=0, high=1)
    guidance_start: float = option(
        0.9, "share of the steps before guidance sets in; 0 = every step is guided", low=0, below=1
    )
    precision: str = option(
        "fp32",
        "of the denoiser's large matrices; bf16 makes many images faster where the processor has it, few slower, and "
        "other bytes",
        choices=("fp32", "bf16"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta and self.sampler != "ddim":
            raise ConfigError(f"--eta {self.eta:g} belongs to --sampler ddim; {self.sampler} has none")

    def sampling_at(self, guidance_scale: float) -> SamplingConfig:
        """These settings alone, without those of a command."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplerConfig)}
        return SamplingConfig(**settings, guidance_scale=guidance_scale)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(SamplerConfig):
    """How images are sampled."""

    guidance_scale: float = option(
        GUIDANCE_SCALE,
        "classifier-free guidance, in the steps after --guidance-start; 1 = off",
        low=0,
        high=MAX_GUIDANCE,
    )

    @property
    def sampling(self) -> SamplingConfig:
        """These settings alone, without those of a command."""
        return self.sampling_at(self.guidance_scale)


@dataclass(frozen=True, kw_only=True)
class InferConfig(ModelConfig, SamplingConfig):
    """``python -m ldm_ray.infer``"""

    num_images: int = option(64, "how many", low=1, high=100_000)
    output: str = option("generated.png", "the picture to write")
    digit: str | None = option(None, "one class alone, by number or name [each in turn]")
    seed: int = option(42, "image i has seed + i", low=0, high=MAX_SEED)
    device: str | None = device_option()
    show_process: bool = option(False, "also write the denoising, as a strip and as a GIF")
    process_steps: int = option(10, "pictures in the strip, one a step at most", low=2, high=MAX_STEPS)
