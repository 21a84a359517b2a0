"""The only reader and writer of checkpoint files, existing and own formats.

Own format 1: one ``torch.save``d dictionary with the existing top-level keys (``model``, ``args``, ``epoch``,
…) and ``format_version``, ``kind``, ``config``, ``schedule``, ``autoencoder``, ``ema``, ``metrics``,
``versions``; ``training`` holds what only resuming needs, and readers may drop it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import ldm_ray
from ldm_ray.checkpoints import record, safe_load
from ldm_ray.checkpoints.record import FORMAT_VERSION
from ldm_ray.checkpoints.restore import (
    UNFINISHED,
    AutoencoderCheckpoint,
    codec_of,
    denoiser_of,
    from_embedded,
    schedule_of,
)
from ldm_ray.checkpoints.safe_load import naming, with_tensors
from ldm_ray.checkpoints.untrusted.tensors import Source
from ldm_ray.checkpoints.weights import kind_of, named, unwrapped
from ldm_ray.data.classes import labels_in, names_in
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.files.paths import AnyPath, write_bytes
from ldm_ray.models.codec import Codec, PixelCodec
from ldm_ray.models.conditioning import ConditionedDenoiser
from ldm_ray.models.registry import detect
from ldm_ray.models.unet import UNet
from ldm_ray.settings.errors import CheckpointError
from ldm_ray.terminal.text import shown

SUMMARY = (
    *("format_version", "epoch", "global_step", "train_loss", "val_loss", "train_seconds"),
    *("quality", "data", "config", "args", "versions"),
)


@dataclass(kw_only=True)
class DiffusionCheckpoint:
    """A denoiser with everything needed to sample; it has the averaged weights where there are any.

    codec: what it diffuses in; None only in existing-format files for which no autoencoder was given. autoencoder:
    None there and in pixel space. averaged, resumable: whether the file has averaged weights, and a training state.
    """

    kind: str
    denoiser: ConditionedDenoiser
    schedule: NoiseSchedule
    codec: Codec | None
    autoencoder: AutoencoderCheckpoint | None
    prediction_type: str
    path: str
    sha256: str
    averaged: bool
    resumable: bool
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def autoencoder_sha256(self) -> str:
        """Empty in pixel space."""
        return self.autoencoder.sha256 if self.autoencoder else ""

    @property
    def class_names(self) -> tuple[str, ...]:
        """As the data it was trained on names them; their numbers where it does not."""
        return names_in(self.info, self.denoiser.num_classes)

    @property
    def labels(self) -> tuple[int, ...]:
        """The classes that are sampled by default: all that it was trained on images of."""
        return labels_in(self.info, self.denoiser.num_classes)

    @property
    def args(self) -> dict[str, Any]:
        """The settings, by the names of existing files."""
        return self.info.get("args", {})

    @property
    def only_digit(self) -> int | None:
        """The one class that it was trained on; None where it was trained on all."""
        return self.args.get("only_digit")

    def joined(self, other: AutoencoderCheckpoint, force: bool = False) -> DiffusionCheckpoint:
        """With another autoencoder, and the statistics of the one inside. CheckpointError where they do not go
        together; a hash or type other than the recorded one is an error unless ``force``."""
        recorded = self.autoencoder
        if recorded is not None and recorded.sha256 != other.sha256 and not force:
            raise CheckpointError(
                f"--ae-ckpt {other.path} has SHA-256 {other.sha256}, but {self.path} was trained with "
                f"{recorded.sha256}: leave --ae-ckpt out to use the one inside, or add --force"
            )
        said = str(self.args.get("ae_model") or other.codec.kind).removeprefix("ae-")
        if said != other.codec.kind and not force:
            raise CheckpointError(
                f"--ae-ckpt {other.path} is of type {other.codec.kind}, but {self.path} needs {shown(said)}"
            )
        if recorded is not None:
            other = replace(other, codec=other.codec.with_statistics(recorded.codec.statistics))
        return self.decoded_by(other)

    def decoded_by(self, autoencoder: AutoencoderCheckpoint) -> DiffusionCheckpoint:
        """CheckpointError where the sizes differ."""
        if autoencoder.codec.latent_dim != self.denoiser.latent_dim:
            raise CheckpointError(
                f"{self.path} denoises {self.denoiser.latent_dim} numbers, the autoencoder "
                f"{shown(autoencoder.path, 200)} makes {autoencoder.codec.latent_dim}"
            )
        return replace(self, codec=autoencoder.codec, autoencoder=autoencoder)


def file_sha256(path: AnyPath) -> str:
    with path.open("rb") as stream:
        return Source(stream, 0, 0).sha256()


def versions() -> dict[str, str]:
    import platform

    return {"ldm_ray": ldm_ray.__version__, "torch": str(torch.__version__), "python": platform.python_version()}


def write(path: AnyPath, content: dict[str, Any]) -> None:
    """Writes a checkpoint at once or not at all: temporary name, fsync, rename. The same content gives the
    same bytes under any name."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getbuffer(), durable=True)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An open file: metadata plain and checked, weights as ``model`` and ``ema`` and not read yet."""

    path: AnyPath
    content: dict[str, Any]
    kind: str  # one of ``KINDS``
    source: Source


@contextmanager
def opened(path: AnyPath, whole: bool = False) -> Iterator[Opened]:
    """whole: the training state is wanted too. CheckpointError in one line."""
    with safe_load.opened(path, whole) as (stored, source):
        with naming(path):
            content = record.checked(unwrapped(stored))
        kind = content.get("kind") or kind_of(content["model"])
        yield Opened(path=path, content=content, kind=kind, source=source)


def read(path: AnyPath) -> tuple[dict[str, Any], str]:
    """(content, kind) with all tensors read, and the training state checked where there is one."""
    with opened(path, whole=True) as file, naming(path):
        content = with_tensors(file.content)
        if content.get("format_version") and "training" in content:
            record.training(content["training"])
        return content, file.kind


def autoencoder_type(path: AnyPath) -> tuple[str, int | None]:
    """(type, the one digit it was trained on) of an autoencoder, without its numbers; ("", None) of a denoiser.
    CheckpointError; ``Foreign`` for a file of something else."""
    with opened(path) as file, naming(path):
        if file.kind != "autoencoder":
            return "", None
        args = file.content["args"]
        return detect(named(file.content["model"], "autoencoder"), args)[0], args.get("only_digit")


def summary(content: dict[str, Any]) -> dict[str, Any]:
    """The metadata worth showing, of content that was checked."""
    state = state_of(content)
    worth = {key: content[key] for key in (*SUMMARY, "exp_name") if content.get(key) not in (None, {})}
    return ({"state": state} if state else {}) | worth


def state_of(content: dict[str, Any]) -> str:
    """How far the training had come, such as "unfinished, epoch 2 of 40"; empty where the file does not say."""
    epoch, epochs = content.get("epoch"), content["config"].get("epochs")
    if type(epoch) is not int or type(epochs) is not int:
        return ""
    training = content.get("training")
    early = isinstance(training, dict) and training.get("finished") is True
    return f"{'finished' if early or epoch >= epochs else UNFINISHED}, epoch {epoch} of {epochs}"


def load(path: AnyPath) -> AutoencoderCheckpoint | DiffusionCheckpoint:
    """The model in a file, of whatever kind, with all that the file says of it. CheckpointError in one line."""
    with opened(path) as file:
        return autoencoder_in(file) if file.kind == "autoencoder" else diffusion_in(file)


def load_autoencoder(path: AnyPath) -> AutoencoderCheckpoint:
    """Reads an autoencoder checkpoint; its type comes from the file. Raises CheckpointError in one line."""
    with opened(path) as file:
        if file.kind != "autoencoder":
            raise CheckpointError(f"checkpoint {path} holds a denoiser, not an autoencoder")
        return autoencoder_in(file)


def load_diffusion(path: AnyPath, ae_ckpt: AnyPath | None = None, force: bool = False) -> DiffusionCheckpoint:
    """Reads a denoiser checkpoint with its autoencoder.

    ae_ckpt: wins over the one inside; a hash other than the recorded one is an error unless ``force``.
    Raises CheckpointError in one line.
    """
    with opened(path) as file:
        if file.kind == "autoencoder":
            raise CheckpointError(f"checkpoint {path} holds an autoencoder, not a denoiser: see --ae-ckpt")
        loaded = diffusion_in(file)
    if ae_ckpt is None:
        return loaded
    if isinstance(loaded.codec, PixelCodec):
        raise CheckpointError(f"{path} diffuses pixels and has no autoencoder: leave --ae-ckpt out")
    return loaded.joined(load_autoencoder(ae_ckpt), force)


def autoencoder_in(file: Opened) -> AutoencoderCheckpoint:
    content = file.content
    return AutoencoderCheckpoint(
        codec=codec_of(content["model"], content["args"], content.get("statistics"), file.path),
        path=str(file.path),
        sha256=file.source.sha256(),
        only_digit=content["args"].get("only_digit"),
        info=summary(content),
    )


def diffusion_in(file: Opened) -> DiffusionCheckpoint:
    """With the autoencoder that the file carries, if it does."""
    path, content, pixels = file.path, file.content, file.kind == "pixel_diffusion"
    args = content["args"] | content["schedule"]
    schedule = schedule_of(args, path)
    denoiser = denoiser_of(content, pixels, schedule.num_train_timesteps, path)
    if (args.get("only_digit") or 0) >= denoiser.num_classes:
        raise CheckpointError(
            f"checkpoint {path}: 'args.only_digit' is {args['only_digit']}, of {denoiser.num_classes} classes"
        )
    loaded = DiffusionCheckpoint(
        kind=file.kind,
        denoiser=denoiser,
        schedule=schedule,
        codec=PixelCodec(denoiser.image_size) if isinstance(denoiser, UNet) else None,
        autoencoder=None,
        prediction_type=content.get("prediction_type") or "epsilon",
        path=str(path),
        sha256=file.source.sha256(),
        averaged="ema" in content,
        resumable="training" in content,
        info=summary(content),
    )
    carried = from_embedded(content.get("autoencoder"), path)
    return loaded if pixels or carried is None else loaded.decoded_by(carried)


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
    model: ConditionedDenoiser,
    ema: ConditionedDenoiser,
    schedule: NoiseSchedule,
    autoencoder: AutoencoderCheckpoint | None,
    config: dict[str, Any],
    **rest: Any,
) -> dict[str, Any]:
    """What a denoiser checkpoint holds: enough to sample from this one file. autoencoder: None in pixel space."""
    about: dict[str, Any] = {"model": "ddpm"}
    shape: dict[str, Any] = {"image_size": list(model.image_size)} if isinstance(model, UNet) else {}
    if autoencoder is not None:
        about = {
            "model": "lddpm",
            "ae_model": f"ae-{autoencoder.codec.kind}",
            "ae_latent_dim": autoencoder.codec.latent_dim,
            "ae_only_digit": autoencoder.only_digit,
            "ae_ckpt": autoencoder.path,
        }
    return {
        "format_version": FORMAT_VERSION,
        "kind": "pixel_diffusion" if autoencoder is None else "latent_diffusion",
        "model": cpu(model.state_dict()),
        "ema": cpu(ema.state_dict()),
        "args": config
        | about
        | {
            "hidden_dim": model.hidden_dim,
            "T": schedule.num_train_timesteps,
            "beta_start": schedule.beta_start,
            "beta_end": schedule.beta_end,
            "beta_schedule": schedule.beta_schedule,
        },
        "config": config,
        "schedule": schedule.to_dict(),
        "prediction_type": config.get("prediction_type", "epsilon"),
        "num_classes": model.num_classes,
        "autoencoder": embed(autoencoder) if autoencoder else None,
        "versions": versions(),
    } | (shape | rest)


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
        "train_seconds": autoencoder.info.get("train_seconds"),
        "model": cpu(codec.model.state_dict()),
        "statistics": {"mean": codec.statistics.mean, "covariance": codec.statistics.covariance},
    }


def cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A plain copy of a state dict on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
