"""Which autoencoders there are, and which one a checkpoint holds.

A new architecture is one class with ``@register(name, latent_key=…)`` above it, imported in
``models/codec.py``; one that takes images of other sizes than 28×28 has ``image_size`` as a second argument and
says so by ``size_multiple``. Discovery without ``--ae-ckpt`` tries them in the order of registration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ldm_ray.settings.errors import CheckpointError, ConfigError, Foreign
from ldm_ray.terminal.text import listed, quoted

MAX_LATENT_DIM = 1024
MAX_SIDE = 1024
IMAGE_SIZE = (28, 28)  # of checkpoints that do not say


@dataclass(frozen=True)
class Entry:
    """build(latent_dim[, image_size]) makes the network; latent_key is the encoder's last weight, (D, …).

    size_multiple: height and width are multiples of it; 0: images of 28×28 alone."""

    name: str
    build: Callable[..., Any]
    latent_key: str
    size_multiple: int


REGISTRY: dict[str, Entry] = {}


def register(name: str, *, latent_key: str, size_multiple: int = 0) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator: makes an autoencoder known under a name."""

    def add(cls: type[nn.Module]) -> type[nn.Module]:
        if name in REGISTRY:
            raise ValueError(f"an autoencoder named {name!r} is registered already")
        REGISTRY[name] = Entry(name, cls, latent_key, size_multiple)
        return cls

    return add


def detect(state: Mapping[str, Any], args: Mapping[str, Any]) -> tuple[str, int]:
    """(type, latent_dim) from a checkpoint's metadata and its state dict, which must agree.

    Raises CheckpointError: unknown type, metadata and weights that disagree, neither of them telling.
    """
    said = args.get("model")
    said = said.removeprefix("ae-").lower() if isinstance(said, str) else None
    if said is not None and said not in REGISTRY:
        raise CheckpointError(
            f"autoencoder type {quoted(args['model'])} is unknown; registered are {', '.join(REGISTRY)}"
        )
    seen = next((entry for entry in REGISTRY.values() if entry.latent_key in state), None)
    if seen is None:
        names = listed(list(state), 3)
        raise Foreign(
            f"the weights fit no registered autoencoder ({', '.join(REGISTRY)}); their first names are {names}"
        )
    if said is not None and said != seen.name:
        raise CheckpointError(f"the metadata says {said!r}, but the weights are of type {seen.name!r}")
    weight = state[seen.latent_key]
    shape = tuple(getattr(weight, "shape", ()))
    latent_dim = int(shape[0]) if shape else 0
    if not 1 <= latent_dim <= MAX_LATENT_DIM:
        raise CheckpointError(f"latent size {latent_dim} is outside 1 to {MAX_LATENT_DIM}")
    if args.get("latent_dim") not in (None, latent_dim):
        raise CheckpointError(f"the metadata says latent_dim {args['latent_dim']!r}, but the weights have {latent_dim}")
    return seen.name, latent_dim


def build(name: str, latent_dim: int, image_size: tuple[int, int] = IMAGE_SIZE) -> Any:
    """A fresh autoencoder of a registered type. CheckpointError: unknown type; ConfigError: ``check_size``."""
    if name not in REGISTRY:
        raise CheckpointError(f"autoencoder type {name!r} is unknown; registered are {', '.join(REGISTRY)}")
    if image_size == IMAGE_SIZE:
        return REGISTRY[name].build(latent_dim)
    check_size(name, image_size)
    return REGISTRY[name].build(latent_dim, image_size)


def check_size(name: str, image_size: tuple[int, int]) -> None:
    """ConfigError unless a registered type takes images of this height and width."""
    multiple, (height, width) = REGISTRY[name].size_multiple, image_size
    if image_size == IMAGE_SIZE or (
        multiple and max(image_size) <= MAX_SIDE and not height % multiple and not width % multiple
    ):
        return
    known = f"height and width multiples of {multiple} up to {MAX_SIDE}" if multiple else "28x28 pixels"
    others = [entry.name for entry in REGISTRY.values() if entry.size_multiple == 1 and entry.name != name]
    hint = f", or take another type: {', '.join(others)}" if others and max(image_size) <= MAX_SIDE else ""
    raise ConfigError(
        f"images are {height}x{width}; the autoencoder type {name} takes {known}: resize them first{hint}"
    )
