"""Builds autoencoder, schedule and denoiser from the dictionaries of a checkpoint file.

The file is not trusted: everything is checked before it is used. Each function raises CheckpointError in one line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm_ray.checkpoints.safe_load import naming
from ldm_ray.checkpoints.untrusted.tensors import FLOATS, Stored, shape_text
from ldm_ray.checkpoints.weights import named, state_dict_of
from ldm_ray.data.statistics import LatentStatistics
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.files.paths import AnyPath
from ldm_ray.models import registry
from ldm_ray.models.codec import LatentCodec
from ldm_ray.models.conditioning import ConditionedDenoiser, sizes_of
from ldm_ray.models.denoiser import Denoiser, blocks_in
from ldm_ray.models.unet import UNet
from ldm_ray.settings.diffusion import BETAS, check_tables
from ldm_ray.settings.errors import CheckpointError, ConfigError, LdmError
from ldm_ray.settings.limits import MAX_CLASSES
from ldm_ray.terminal.text import shown

UNFINISHED = "unfinished"
MAX_EMBEDDING = 4096
ROUNDING = 1e-6  # of a covariance's largest entry


@dataclass(kw_only=True)
class AutoencoderCheckpoint:
    """A frozen autoencoder and where it came from; sha256 is of the file."""

    codec: LatentCodec
    path: str
    sha256: str
    kind: str = "autoencoder"
    only_digit: int | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def unfinished(self) -> str:
        """How far its training had come, where that is not the end: "unfinished, epoch 2 of 40"; else empty."""
        state = str(self.info.get("state", ""))
        return state if state.startswith(UNFINISHED) else ""


def denoiser_of(content: dict[str, Any], pixels: bool, timesteps: int, path: AnyPath) -> ConditionedDenoiser:
    """The averaged weights where there are any, else the weights, for sampling alone."""
    weights = content.get("ema") or content["model"]
    with naming(path):
        try:
            check_denoiser(named(weights, "denoiser"), pixels, timesteps)
            state = state_dict_of(weights, "denoiser")
            size = image_size_of(content.get("image_size"))
            denoiser = UNet.from_state(state, size) if pixels else Denoiser.from_state(state)
        except ConfigError as error:
            raise CheckpointError(f"is too large: {error}") from None
        except (AttributeError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"the weights are not the denoiser's: {one_line(error)}") from None
        except LdmError:
            raise
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"the weights are not the denoiser's: {one_line(error)}") from None
    return denoiser.eval().requires_grad_(False)


def one_line(error: Exception) -> str:
    return shown(" ".join(str(error)[:400].split()), 200)


def check_denoiser(state: dict[str, Any], pixels: bool, timesteps: int) -> None:
    """Before anything of a size that the file chooses is made. CheckpointError, RuntimeError, KeyError."""
    classes, embedding_dim, sinusoid_dim = sizes_of(state)
    if not 1 <= classes <= MAX_CLASSES:
        raise CheckpointError(f"has {classes} classes; 1 to {MAX_CLASSES} are possible")
    if max(embedding_dim, sinusoid_dim) > MAX_EMBEDDING:
        raise CheckpointError(f"has embeddings of {max(embedding_dim, sinusoid_dim)}; at most {MAX_EMBEDDING} are read")
    if not pixels:
        hidden_dim, _ = state["in_proj.weight"].shape
        check_tables(timesteps, blocks_in(state), hidden_dim, embedding_dim)


def schedule_of(args: dict[str, Any], path: AnyPath) -> NoiseSchedule:
    """From settings that were checked one by one."""
    timesteps = args.get("num_train_timesteps") or args.get("T") or 1000
    betas = args.get("beta_start") or BETAS[0], args.get("beta_end") or BETAS[1]
    with naming(path):
        return NoiseSchedule(timesteps, *betas, args.get("beta_schedule") or "linear")


def from_embedded(value: Any, path: AnyPath | str) -> AutoencoderCheckpoint | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
        raise CheckpointError(f"checkpoint {path}: its autoencoder is damaged")
    args = {"model": value.get("type"), "latent_dim": value.get("latent_dim"), "image_size": value.get("image_size")}
    seconds = value.get("train_seconds")
    return AutoencoderCheckpoint(
        codec=codec_of(value["model"], args, value.get("statistics"), path),
        path=str(value.get("path")),
        sha256=str(value.get("sha256")),
        only_digit=value.get("only_digit"),
        info={} if seconds is None else {"train_seconds": seconds},
    )


def codec_of(weights: Any, args: dict[str, Any], statistics: Any, path: AnyPath | str) -> LatentCodec:
    with naming(path):
        try:
            kind, latent_dim = registry.detect(named(weights, "autoencoder"), args)
            image_size = image_size_of(args.get("image_size"))
            registry.check_size(kind, image_size)
            known, state = statistics_of(statistics, latent_dim), state_dict_of(weights, "autoencoder")
            codec = LatentCodec.from_state(kind, latent_dim, state, known, image_size)
        except RuntimeError as error:
            raise CheckpointError(f"the weights do not fit: {one_line(error)}") from None
        if not all(bool(torch.isfinite(part).all()) for part in (codec.mean, codec.whitening, codec.colouring)):
            raise CheckpointError("the latent statistics are damaged: they are beyond float32")
    return codec


def image_size_of(value: Any) -> tuple[int, int]:
    """(height, width) of sides that were checked; files that do not say hold autoencoders of 28×28."""
    height, width = value or registry.IMAGE_SIZE
    return height, width


def statistics_of(value: Any, latent_dim: int) -> LatentStatistics | None:
    """CheckpointError without the file's name unless they are finite, and the covariance symmetric and positive
    semidefinite, to rounding."""
    if value is None:
        return None
    parts: list[Tensor] = []
    for key, shape in ("mean", (latent_dim,)), ("covariance", (latent_dim, latent_dim)):
        part = value.get(key) if isinstance(value, dict) else None
        if not isinstance(part, (Stored, Tensor)) or tuple(part.shape) != shape or part.dtype not in FLOATS:
            raise CheckpointError(
                f"the latent statistics are damaged: {key} is no tensor of {shape_text(shape)} numbers"
            )
        parts.append((part.read() if isinstance(part, Stored) else part).double())
    mean, covariance = parts
    if not bool(torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise CheckpointError("the latent statistics are damaged: they hold NaN or infinite numbers")
    largest = covariance.abs().max()
    if bool((covariance - covariance.T).abs().max() > ROUNDING * largest):
        raise CheckpointError("the latent statistics are damaged: the covariance is not symmetric")
    lowest = torch.linalg.eigvalsh(covariance)[0]
    if bool(lowest < -ROUNDING * latent_dim * largest):
        raise CheckpointError("the latent statistics are damaged: the covariance has a negative variance")
    return LatentStatistics(mean, covariance)
