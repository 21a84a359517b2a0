"""An image as JSON has it, over HTTP or in a line of a file: the same image, the same bytes."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm_ray.data.images import encode_png, enlarged
from ldm_ray.diffusion.samplers import DEFAULT_SPACING
from ldm_ray.settings.sampling import SamplingConfig


@dataclass(frozen=True)
class Made:
    """One image: pixels (H, W) uint8 at 28×28 and what it follows from; pixels None: it failed."""

    pixels: np.ndarray | None
    seed: int | None
    label: int | None
    text: dict[str, str]
    error: dict[str, Any] | None = None


def parameters(
    model: str, checkpoint: str, fingerprint: str, sampling: SamplingConfig | None, steps: int
) -> dict[str, str]:
    """What the PNG of every image of a request says, beside seed and label. checkpoint: its SHA-256."""
    text = {"model": model, "checkpoint": checkpoint, "fingerprint": fingerprint}
    if sampling is not None:
        text |= {"sampler": sampling.sampler, "steps": str(steps)}
        text |= {"guidance": f"{sampling.guidance_scale:g}", "guidance_start": f"{sampling.guidance_start:g}"}
        if sampling.timestep_spacing not in (None, DEFAULT_SPACING):
            text["timestep_spacing"] = str(sampling.timestep_spacing)
        if sampling.eta:
            text["eta"] = f"{sampling.eta:g}"
    return text


def parameters_of_one(common: dict[str, str], seed: int, label: int | None) -> dict[str, str]:
    """What the PNG of this image says. common: the parameters of the request."""
    return common | {"seed": str(seed), "label": "none" if label is None else str(label)}


def png(made: Made, scale: int = 1) -> bytes:
    """The PNG of one image, with its parameters as text."""
    assert made.pixels is not None
    return encode_png(enlarged(made.pixels, scale), made.text)


def item(made: Made, scale: int) -> dict[str, Any]:
    """What JSON says of an image."""
    fields: dict[str, Any] = {"seed": made.seed, "label": made.label}
    if made.pixels is None:
        return fields | {"error": made.error}
    data = png(made, scale)
    return fields | {"b64_json": base64.b64encode(data).decode(), "sha256": hashlib.sha256(data).hexdigest()}
