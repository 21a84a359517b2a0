"""The one check of what a checkpoint says beside its weights: each key that is read, by its type and its range."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ldm_ray.checkpoints.safe_load import Plain
from ldm_ray.checkpoints.untrusted.tensors import Unread
from ldm_ray.models.registry import MAX_LATENT_DIM, MAX_SIDE
from ldm_ray.settings.diffusion import BETA_SCHEDULES, PREDICTION_TYPES
from ldm_ray.settings.errors import CheckpointError
from ldm_ray.settings.limits import MAX_CLASSES
from ldm_ray.terminal.text import quoted, shown

FORMAT_VERSION = 1
KINDS = ("autoencoder", "latent_diffusion", "pixel_diffusion")
MAX_TIMESTEPS = 100_000
MAX_COUNT = 10**15
Check = Callable[[Any], Any]


class Wrong(Exception):
    """Says what a value should have been."""


def whole(low: int, high: int) -> Check:
    """A whole number, also where a trainer kept it as 3.0."""

    def check(value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise Wrong(f"a whole number from {low} to {high}")
        return value

    return check


def number(low: float, high: float) -> Check:
    def check(value: Any) -> float | int:
        if type(value) not in (int, float) or not low <= value <= high:
            raise Wrong(f"a number from {low:g} to {high:g}")
        return value

    return check


def loss(value: Any) -> float | None:
    """None for one that is not finite: a run that went wrong keeps its record."""
    if type(value) not in (int, float):
        raise Wrong("a number")
    return float(value) if abs(value) < 1e300 and math.isfinite(value) else None


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise Wrong("a text")
    return value


def short(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 100:
        raise Wrong("a text of at most 100 characters")
    return value


def one_of(*known: str) -> Check:
    def check(value: Any) -> str:
        if value not in known:
            raise Wrong(f"one of {', '.join(known)}")
        return value

    return check


def size(value: Any) -> list[int]:
    sides = value if isinstance(value, list) else []
    if len(sides) != 2 or any(type(side) is not int or not 1 <= side <= MAX_SIDE for side in sides):
        raise Wrong(f"height and width, 1 to {MAX_SIDE}")
    return sides


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Wrong("true or false")
    return value


def dictionary(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Wrong("a dictionary")
    return value


def best(value: Any) -> dict[str, Any]:
    """The best epoch so far; its loss is infinite before there is one."""
    if not isinstance(value, dict) or type(value.get("val_loss")) not in (int, float) or "epoch" not in value:
        raise Wrong("a dictionary of val_loss and epoch")
    return value


DIGIT = whole(0, MAX_CLASSES - 1)
# A value of None counts as missing, everywhere.
TOP: dict[str, Check] = {
    "epoch": number(0, MAX_COUNT),
    "global_step": number(0, MAX_COUNT),
    "train_seconds": number(0, MAX_COUNT),
    "train_loss": loss,
    "val_loss": loss,
    "exp_name": text,
    "prediction_type": one_of(*PREDICTION_TYPES),
    "num_classes": whole(1, MAX_CLASSES),
    "image_size": size,
}
ARGS: dict[str, Check] = {
    "model": text,
    "latent_dim": whole(1, MAX_LATENT_DIM),
    "image_size": size,
    "only_digit": DIGIT,
    "ae_only_digit": DIGIT,
    "ae_model": text,
    "ae_ckpt": text,
    "T": whole(2, MAX_TIMESTEPS),
    "num_train_timesteps": whole(2, MAX_TIMESTEPS),
    "beta_start": number(1e-10, 0.9999),
    "beta_end": number(1e-10, 0.9999),
    "beta_schedule": one_of(*BETA_SCHEDULES),
    "prediction_type": one_of(*PREDICTION_TYPES),
    "batch_size": whole(1, MAX_COUNT),
}
EMBEDDED: dict[str, Check] = {
    "type": short,
    "latent_dim": whole(1, MAX_LATENT_DIM),
    "image_size": size,
    "path": text,
    "sha256": short,
    "only_digit": DIGIT,
    "train_seconds": number(0, MAX_COUNT),
}
TRAINING: dict[str, Check] = {
    "ema_updates": whole(0, MAX_COUNT),
    "epoch": whole(0, MAX_COUNT),
    "step": whole(0, MAX_COUNT),
    "loss_sum": number(-1e300, 1e300),
    "finished": flag,
    "best": best,
    "optimizer": dictionary,
    "scaler": dictionary,
}
GROUPS: dict[str, dict[str, Check]] = {"args": ARGS, "schedule": ARGS, "config": {}, "data": {}, "versions": {}}
HYPER = ("hyper_parameters", "hparams", "config")  # where other trainers keep what is in args here
LOOSE = ("config", "data", "versions", "quality")  # words that other trainers use for other things


def checked(content: dict[str, Any]) -> dict[str, Any]:
    """The content with everything but weights and training state as plain data that was checked; ``args``,
    ``schedule``, ``config``, ``data`` and ``versions`` are dictionaries. CheckpointError without the file's name."""
    plain, metadata = Plain(), dict(content)
    if metadata.get("args") is None and metadata.get("format_version") is None:
        groups = [metadata[key] for key in HYPER if isinstance(metadata.get(key), dict)]
        metadata["args"] = {key: group[key] for group in groups[:1] for key in ARGS if key in group and key != "model"}
    for key in LOOSE:
        if metadata.get("format_version") is None and not isinstance(metadata.get(key), dict):
            metadata.pop(key, None)
    for key in (*TOP, *GROUPS, "quality", "kind", "format_version"):
        if key in metadata:
            metadata[key] = plain(metadata[key])
    check_version(metadata.get("format_version"), metadata.get("versions"))
    for key, checks in GROUPS.items():
        value = metadata.get(key) or {}
        if not isinstance(value, dict):
            what = str(value) if isinstance(value, Unread) else f"a {type(value).__name__}"
            raise CheckpointError(f"{key!r} is {what}, not a dictionary")
        metadata[key] = value
        apply(value, checks, key)
    apply(metadata, TOP, "")
    if metadata.get("kind") not in (None, *KINDS):
        raise CheckpointError(f"is of kind {quoted(metadata['kind'], 40)}; known are {', '.join(KINDS)}")
    embedded = content.get("autoencoder")
    if isinstance(embedded, dict):
        metadata["autoencoder"] = dict(embedded) | {key: plain(embedded[key]) for key in EMBEDDED if key in embedded}
        apply(metadata["autoencoder"], EMBEDDED, "autoencoder")
    return metadata


def apply(values: dict[str, Any], checks: dict[str, Check], group: str) -> None:
    """Checks the values in place. CheckpointError names the first that is wrong."""
    for key, check in checks.items():
        value = values.get(key)
        if value is None:
            continue
        try:
            values[key] = check(value)
        except Wrong as wrong:
            name = f"{group}.{key}" if group else key
            raise CheckpointError(f"{name!r} must be {wrong}, not {quoted(value, 60)}") from None


def check_version(value: Any, versions: Any) -> None:
    if value is not None and (type(value) is not int or not 0 <= value <= FORMAT_VERSION):
        needed = versions.get("ldm_ray") if isinstance(versions, dict) else None
        raise CheckpointError(
            f"has format {quoted(value, 40)}, this ldm_ray reads up to {FORMAT_VERSION}: "
            f"install ldm_ray {shown(needed or 'a newer version')}"
        )


def training(value: Any) -> dict[str, Any]:
    """The training state of a run to resume. CheckpointError without the file's name where it is missing or damaged."""
    missing = [key for key in TRAINING if not isinstance(value, dict) or value.get(key) is None]
    if missing:
        raise CheckpointError(f"holds no training state: {missing[0]!r} is missing")
    apply(value, TRAINING, "training")
    return value
