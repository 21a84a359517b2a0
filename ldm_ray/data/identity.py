"""Which images a run was trained on: the record of them, and whether other images are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ldm_ray
from ldm_ray.data.sources import ImageSource, content_hash


def identity_of(source: ImageSource, autoencoder_sha256: str | None) -> dict[str, Any]:
    """What the examples follow from."""
    return {
        "autoencoder_sha256": autoencoder_sha256,
        "dataset": source.name if "/" not in source.name or not Path(source.name).is_absolute() else "folder",
        "revision": source.revision,
        "split": source.split,
        "only_digit": source.only_digit,
        "version": ldm_ray.__version__,
    }


def record_of(source: ImageSource, autoencoder_sha256: str | None) -> dict[str, Any]:
    """A checkpoint's ``data``: the identity of its examples, and what does not change them.

    content: a hash of the images and labels themselves, wherever they lie and however they are cut into files.
    """
    shape = {"image_size": list(source.image_size), "class_names": list(source.class_names)}
    shape |= {"without_images": list(source.without_images)}
    return identity_of(source, autoencoder_sha256) | {"content": content_hash(source.table)} | shape


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How these data differ from those recorded by an earlier run. The same images from another place are the same
    data."""
    same = any(before.get(key) == now[key] for key in ("content", "revision"))
    passed = {"content", "without_images"} | ({"dataset", "revision"} if same else set())
    return [
        f"{key} {old} then, {now.get(key)} now"
        for key, old in before.items()
        if key not in passed and now.get(key) != old
    ]
