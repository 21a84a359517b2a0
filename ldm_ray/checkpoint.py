"""The only reader and writer of checkpoint files, existing and own formats.

Own format 1: one ``torch.save``d dictionary with the existing top-level keys (``model``, ``args``, ``epoch``,
…) and ``format_version``, ``kind``, ``config``, ``schedule``, ``autoencoder``, ``ema``, ``metrics``,
``versions``; ``training`` holds what only resuming needs, and readers may drop it.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ldm_ray
from ldm_ray.classes import names_in
from ldm_ray.config import PREDICTION_TYPES
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.errors import CheckpointError, ConfigError
from ldm_ray.models import registry
from ldm_ray.models.codec import LatentCodec, LatentStatistics
from ldm_ray.models.denoiser import Denoiser
from ldm_ray.safe_load import plain, read_torch_file, state_dict_of

FORMAT_VERSION = 1
MAX_TIMESTEPS = 100_000
SUMMARY = (
    *("format_version", "epoch", "global_step", "train_loss", "val_loss"),
    *("quality", "data", "config", "args", "versions"),
)


@dataclass(kw_only=True)
class AutoencoderCheckpoint:
    """A frozen autoencoder and where it came from; sha256 is of the file."""

    codec: LatentCodec
    path: str
    sha256: str
    only_digit: int | None = None
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class DiffusionCheckpoint:
    """A denoiser with everything needed to sample. ``autoencoder`` is None only in existing-format files
    for which none was given; ``denoiser`` has the averaged weights where there are any."""

    denoiser: Denoiser
    schedule: NoiseSchedule
    autoencoder: AutoencoderCheckpoint | None
    prediction_type: str
    path: str
    sha256: str
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def class_names(self) -> tuple[str, ...]:
        """As the data it was trained on names them; their numbers where it does not."""
        return names_in(self.info, self.denoiser.num_classes)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    import platform

    return {"ldm_ray": ldm_ray.__version__, "torch": str(torch.__version__), "python": platform.python_version()}


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint at once or not at all: temporary name, fsync, rename. The same content gives the
    same bytes under any name."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as stream:
            stream.write(buffer.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Any], str]:
    """(content with plain metadata, kind: ``autoencoder`` | ``latent_diffusion``). CheckpointError in one line."""
    content = read_torch_file(path)
    version = content.get("format_version", 0)
    if not isinstance(version, int) or isinstance(version, bool) or version > FORMAT_VERSION:
        needed = plain(content.get("versions"))
        needed = needed.get("ldm_ray", "a newer version") if isinstance(needed, dict) else "a newer version"
        raise CheckpointError(
            f"checkpoint {path} has format {version!r}, this ldm_ray reads up to {FORMAT_VERSION}: "
            f"install ldm_ray {' '.join(str(needed).split())[:80]}"
        )
    try:
        content |= {key: plain(content[key]) for key in (*SUMMARY, "exp_name") if key in content}
    except RecursionError:
        raise CheckpointError(f"checkpoint {path}: its metadata is nested without end") from None
    for key in ("args", "config", "data", "schedule", "metrics", "versions"):
        content[key] = plain(content.get(key)) or {}
        if not isinstance(content[key], dict):
            raise CheckpointError(f"checkpoint {path}: {key!r} is a {type(content[key]).__name__}, not a dictionary")
    if not isinstance(content.get("model"), dict):
        raise CheckpointError(f"checkpoint {path} has no 'model' weights")
    names = {str(name).replace("_orig_mod.", "").replace("module.", "") for name in content["model"]}
    kind = content.get("kind") or ("latent_diffusion" if "time.fc1.weight" in names else "autoencoder")
    if kind not in ("autoencoder", "latent_diffusion"):
        raise CheckpointError(f"checkpoint {path} is of kind {kind!r}; known are autoencoder, latent_diffusion")
    return content, kind


def summary(content: dict[str, Any]) -> dict[str, Any]:
    """The metadata worth showing."""
    found = {key: plain(content[key]) for key in SUMMARY if content.get(key) not in (None, {})}
    return found | {"exp_name": str(content["exp_name"])} if content.get("exp_name") else found


def load_autoencoder(path: Path) -> AutoencoderCheckpoint:
    """Reads an autoencoder checkpoint; its type comes from the file. Raises CheckpointError in one line."""
    content, kind = read(path)
    if kind != "autoencoder":
        raise CheckpointError(f"checkpoint {path} holds a denoiser, not an autoencoder")
    codec = _codec(content["model"], content["args"], content.get("statistics"), path)
    return AutoencoderCheckpoint(
        codec=codec,
        path=str(path),
        sha256=file_sha256(path),
        only_digit=content["args"].get("only_digit"),
        info=summary(content),
    )


def load_diffusion(path: Path, ae_ckpt: Path | None = None, force: bool = False) -> DiffusionCheckpoint:
    """Reads a denoiser checkpoint with its autoencoder.

    ae_ckpt: wins over the one inside; a hash other than the recorded one is an error unless ``force``.
    Raises CheckpointError in one line.
    """
    content, kind = read(path)
    if kind != "latent_diffusion":
        raise CheckpointError(f"checkpoint {path} holds an autoencoder, not a denoiser: see --ae-ckpt")
    state = state_dict_of(content.get("ema") or content["model"], path, "denoiser")
    args = content["args"] | content["schedule"]
    try:
        denoiser = Denoiser.from_state(state)
    except (KeyError, RuntimeError, ValueError, IndexError) as error:
        first = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint {path}: the weights are not the denoiser's: {first}") from None
    try:
        timesteps = int(args.get("num_train_timesteps") or args.get("T") or 1000)
        if timesteps > MAX_TIMESTEPS:
            raise ConfigError(f"T is at most {MAX_TIMESTEPS}, not {timesteps}")
        betas = float(args.get("beta_start") or 1e-4), float(args.get("beta_end") or 2e-2)
        schedule = NoiseSchedule(timesteps, *betas, str(args.get("beta_schedule") or "linear"))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # ConfigError is a ValueError
        raise CheckpointError(
            f"checkpoint {path}: T, beta_start, beta_end or beta_schedule is unusable: {error}"
        ) from None
    prediction_type = content.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise CheckpointError(
            f"checkpoint {path}: prediction type {str(prediction_type)[:40]!r} is unknown; known are "
            f"{', '.join(PREDICTION_TYPES)}"
        )
    autoencoder = from_embedded(content.get("autoencoder"), path)
    if ae_ckpt is not None:
        given, recorded = load_autoencoder(ae_ckpt), autoencoder
        if recorded is not None and recorded.sha256 != given.sha256 and not force:
            raise CheckpointError(
                f"--ae-ckpt {ae_ckpt} has SHA-256 {given.sha256}, but {path} was trained with {recorded.sha256}: "
                "leave --ae-ckpt out to use the one inside, or add --force"
            )
        if recorded is not None:
            given.codec = given.codec.with_statistics(recorded.codec.statistics)
        said = str(args.get("ae_model") or given.codec.kind).removeprefix("ae-")
        if said != given.codec.kind and not force:
            raise CheckpointError(f"--ae-ckpt {ae_ckpt} is of type {given.codec.kind}, but {path} needs {said}")
        autoencoder = given
    if autoencoder is not None and autoencoder.codec.latent_dim != denoiser.latent_dim:
        raise CheckpointError(
            f"{path} denoises {denoiser.latent_dim} numbers, the autoencoder {autoencoder.path} "
            f"makes {autoencoder.codec.latent_dim}"
        )
    return DiffusionCheckpoint(
        denoiser=denoiser.eval().requires_grad_(False),
        schedule=schedule,
        autoencoder=autoencoder,
        prediction_type=prediction_type,
        path=str(path),
        sha256=file_sha256(path),
        info=summary(content),
    )


def autoencoder_content(model: Any, kind: str, args: dict[str, Any], **rest: Any) -> dict[str, Any]:
    """What an autoencoder checkpoint holds. args: the run's configuration."""
    return {
        "format_version": FORMAT_VERSION,
        "kind": "autoencoder",
        "model": cpu(model.state_dict()),
        "args": args
        | {
            "model": kind,
            "latent_dim": model.latent_dim,
            "image_size": list(model.image_size),
            "only_digit": args.get("only_digit"),
        },
        "config": args,
        "versions": versions(),
    } | rest


def diffusion_content(
    model: Denoiser,
    ema: Denoiser,
    schedule: NoiseSchedule,
    autoencoder: AutoencoderCheckpoint,
    config: dict[str, Any],
    **rest: Any,
) -> dict[str, Any]:
    """What a denoiser checkpoint holds: enough to sample from this one file."""
    codec = autoencoder.codec
    return {
        "format_version": FORMAT_VERSION,
        "kind": "latent_diffusion",
        "model": cpu(model.state_dict()),
        "ema": cpu(ema.state_dict()),
        "args": config
        | {
            "model": "lddpm",
            "hidden_dim": model.hidden_dim,
            "T": schedule.num_train_timesteps,
            "beta_start": schedule.beta_start,
            "beta_end": schedule.beta_end,
            "beta_schedule": schedule.beta_schedule,
            "ae_model": f"ae-{codec.kind}",
            "ae_latent_dim": codec.latent_dim,
            "ae_only_digit": autoencoder.only_digit,
            "ae_ckpt": autoencoder.path,
        },
        "config": config,
        "schedule": schedule.to_dict(),
        "prediction_type": config.get("prediction_type", "epsilon"),
        "num_classes": model.num_classes,
        "autoencoder": embed(autoencoder),
        "versions": versions(),
    } | rest


def embed(autoencoder: AutoencoderCheckpoint) -> dict[str, Any]:
    """An autoencoder as it is carried inside a denoiser checkpoint."""
    codec = autoencoder.codec
    return {
        "type": codec.kind,
        "latent_dim": codec.latent_dim,
        "image_size": list(codec.image_size),
        "path": autoencoder.path,
        "sha256": autoencoder.sha256,
        "only_digit": autoencoder.only_digit,
        "model": cpu(codec.model.state_dict()),
        "statistics": {"mean": codec.statistics.mean, "covariance": codec.statistics.covariance},
    }


def from_embedded(value: Any, path: Path) -> AutoencoderCheckpoint | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
        raise CheckpointError(f"checkpoint {path}: its autoencoder is damaged")
    args = {"model": value.get("type"), "latent_dim": value.get("latent_dim"), "image_size": value.get("image_size")}
    return AutoencoderCheckpoint(
        codec=_codec(value["model"], args, value.get("statistics"), path),
        path=str(value.get("path")),
        sha256=str(value.get("sha256")),
        only_digit=value.get("only_digit"),
    )


def _codec(weights: Any, args: dict[str, Any], statistics: Any, path: Path) -> LatentCodec:
    state = state_dict_of(weights, path, "autoencoder")
    try:
        kind, latent_dim = registry.detect(state, args)
        image_size = _image_size(args.get("image_size"))
        return LatentCodec.from_state(kind, latent_dim, state, _statistics(statistics, latent_dim), image_size)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from None
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint {path}: the weights do not fit: {first}") from None


def _image_size(value: Any) -> tuple[int, int]:
    """(height, width); files that do not say hold autoencoders of 28×28."""
    if value is None:
        return registry.IMAGE_SIZE
    sides = list(value) if isinstance(value, (list, tuple)) else []
    if len(sides) != 2 or any(type(side) is not int or not 1 <= side <= registry.MAX_SIDE for side in sides):
        raise CheckpointError(f"image_size is height and width, 1 to {registry.MAX_SIDE}, not {str(value)[:40]}")
    return sides[0], sides[1]


def _statistics(value: Any, latent_dim: int) -> LatentStatistics | None:
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


def cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A plain copy of a state dict on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
