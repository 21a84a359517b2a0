"""From the dictionaries of a checkpoint file to what they hold: autoencoder, schedule, denoiser. Each raises
CheckpointError in one line; what is in a file is believed in nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm_ray.config import PREDICTION_TYPES
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.errors import CheckpointError, ConfigError
from ldm_ray.models import registry
from ldm_ray.models.codec import LatentCodec, LatentStatistics
from ldm_ray.models.conditioning import ConditionedDenoiser
from ldm_ray.models.denoiser import Denoiser
from ldm_ray.models.unet import UNet
from ldm_ray.paths import AnyPath
from ldm_ray.safe_load import state_dict_of

MAX_TIMESTEPS = 100_000
UNFINISHED = "unfinished"


@dataclass(kw_only=True)
class AutoencoderCheckpoint:
    """A frozen autoencoder and where it came from; sha256 is of the file."""

    codec: LatentCodec
    path: str
    sha256: str
    only_digit: int | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def unfinished(self) -> str:
        """How far its training had come, where that is not the end: "unfinished, epoch 2 of 40"; else empty."""
        state = str(self.info.get("state", ""))
        return state if state.startswith(UNFINISHED) else ""


def denoiser_of(content: dict[str, Any], pixels: bool, path: AnyPath) -> ConditionedDenoiser:
    """The averaged weights where there are any, else the weights, for sampling alone."""
    state = state_dict_of(content.get("ema") or content["model"], path, "denoiser")
    try:
        found = (
            UNet.from_state(state, image_size_of(content.get("image_size"))) if pixels else Denoiser.from_state(state)
        )
    except (KeyError, RuntimeError, ValueError, IndexError) as error:
        first = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint {path}: the weights are not the denoiser's: {first}") from None
    return found.eval().requires_grad_(False)


def schedule_of(args: dict[str, Any], path: AnyPath) -> NoiseSchedule:
    try:
        timesteps = int(args.get("num_train_timesteps") or args.get("T") or 1000)
        if timesteps > MAX_TIMESTEPS:
            raise ConfigError(f"T is at most {MAX_TIMESTEPS}, not {timesteps}")
        betas = float(args.get("beta_start") or 1e-4), float(args.get("beta_end") or 2e-2)
        return NoiseSchedule(timesteps, *betas, str(args.get("beta_schedule") or "linear"))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # ConfigError is a ValueError
        raise CheckpointError(
            f"checkpoint {path}: T, beta_start, beta_end or beta_schedule is unusable: {error}"
        ) from None


def prediction_type_of(content: dict[str, Any], path: AnyPath) -> str:
    found = content.get("prediction_type", "epsilon")
    if found not in PREDICTION_TYPES:
        raise CheckpointError(
            f"checkpoint {path}: prediction type {str(found)[:40]!r} is unknown; known are "
            f"{', '.join(PREDICTION_TYPES)}"
        )
    return found


def from_embedded(value: Any, path: AnyPath) -> AutoencoderCheckpoint | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
        raise CheckpointError(f"checkpoint {path}: its autoencoder is damaged")
    args = {"model": value.get("type"), "latent_dim": value.get("latent_dim"), "image_size": value.get("image_size")}
    return AutoencoderCheckpoint(
        codec=codec_of(value["model"], args, value.get("statistics"), path),
        path=str(value.get("path")),
        sha256=str(value.get("sha256")),
        only_digit=value.get("only_digit"),
        info={"train_seconds": seconds} if isinstance(seconds := value.get("train_seconds"), float) else {},
    )


def codec_of(weights: Any, args: dict[str, Any], statistics: Any, path: AnyPath) -> LatentCodec:
    state = state_dict_of(weights, path, "autoencoder")
    try:
        kind, latent_dim = registry.detect(state, args)
        image_size = image_size_of(args.get("image_size"))
        return LatentCodec.from_state(kind, latent_dim, state, statistics_of(statistics, latent_dim), image_size)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from None
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint {path}: the weights do not fit: {first}") from None


def image_size_of(value: Any) -> tuple[int, int]:
    """(height, width); files that do not say hold autoencoders of 28×28."""
    if value is None:
        return registry.IMAGE_SIZE
    sides = list(value) if isinstance(value, (list, tuple)) else []
    if len(sides) != 2 or any(type(side) is not int or not 1 <= side <= registry.MAX_SIDE for side in sides):
        raise CheckpointError(f"image_size is height and width, 1 to {registry.MAX_SIDE}, not {str(value)[:40]}")
    return sides[0], sides[1]


def statistics_of(value: Any, latent_dim: int) -> LatentStatistics | None:
    if value is None:
        return None
    mean, covariance = (value.get(key) if isinstance(value, dict) else None for key in ("mean", "covariance"))
    if (
        not isinstance(mean, Tensor)
        or not isinstance(covariance, Tensor)
        or any(part.layout != torch.strided or not part.is_floating_point() for part in (mean, covariance))
        or mean.shape != (latent_dim,)
        or covariance.shape != (latent_dim, latent_dim)
        or not bool(torch.isfinite(covariance).all() and torch.isfinite(mean).all())
    ):
        raise CheckpointError("the latent statistics are damaged")
    return LatentStatistics(mean, covariance)
