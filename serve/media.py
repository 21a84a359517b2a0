"""Images as a client asks for them: JSON, PNG, GIF, npy, zip. Same images, same bytes."""

import base64
import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm_ray.data.images import encode_png, grid
from serve.errors import ApiError

JSON, PNG, GIF, NPY, ZIP = "application/json", "image/png", "image/gif", "application/x-npy", "application/zip"
KINDS = (JSON, PNG, GIF, NPY, ZIP)
GIF_FRAMES = 40
EPOCH = (1980, 1, 1, 0, 0, 0)  # the same bytes whenever a zip is made


@dataclass(frozen=True)
class Made:
    """One image: pixels (H, W) uint8 at 28×28 and what it follows from; pixels None: it failed."""

    pixels: np.ndarray | None
    seed: int | None
    label: int | None
    text: dict[str, str]
    error: dict[str, Any] | None = None


def negotiate(accept: str | None, kinds: Sequence[str] = KINDS) -> str:
    """The kind that an Accept header prefers; the first for none. ApiError 406 when none of them will do."""
    best: tuple[float, int, int] | None = None
    wanted = kinds[0]
    for part in (accept or "*/*").split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    quality = float(parameter[2:])
                except ValueError:
                    quality = 0.0
        for order, kind in enumerate(kinds):
            if name not in (kind, "*/*", f"{kind.split('/')[0]}/*") or not quality > 0:
                continue
            rank = (quality, 0 if "*" in name else 1, -order)
            if best is None or rank > best:
                best, wanted = rank, kind
    if best is None:
        raise ApiError(406, f"this address gives {', '.join(kinds)}", "Accept")
    return wanted


def enlarged(pixels: np.ndarray, scale: int) -> np.ndarray:
    """(…, H, W) with every pixel repeated scale × scale times."""
    return pixels if scale == 1 else pixels.repeat(scale, axis=-2).repeat(scale, axis=-1)


def png(made: Made, scale: int = 1) -> bytes:
    """The PNG of one image, with its parameters as text."""
    assert made.pixels is not None
    return encode_png(enlarged(made.pixels, scale), made.text)


def items(images: Sequence[Made], scale: int) -> list[dict[str, Any]]:
    """What JSON says of each image."""
    found = []
    for made in images:
        told: dict[str, Any] = {"seed": made.seed, "label": made.label}
        if made.pixels is None:
            told["error"] = made.error
        else:
            data = png(made, scale)
            told["b64_json"] = base64.b64encode(data).decode()
            told["sha256"] = hashlib.sha256(data).hexdigest()
        found.append(told)
    return found


def stack(images: Sequence[Made]) -> np.ndarray:
    """(N, H, W) of those that did not fail."""
    return np.stack([made.pixels for made in images if made.pixels is not None])


def render(kind: str, images: Sequence[Made], scale: int, common: dict[str, str]) -> bytes:
    """PNG (one image, or a grid), npy (N, H, W) uint8, or zip of all images that did not fail."""
    fine = [made for made in images if made.pixels is not None]
    if kind == NPY:
        buffer = io.BytesIO()
        np.save(buffer, enlarged(stack(fine), scale))
        return buffer.getvalue()
    if kind == ZIP:
        return zipped(images, scale, common)
    if len(fine) == 1:
        return png(fine[0], scale)
    return encode_png(
        enlarged(sheet(stack(fine)), scale), common | {"seeds": ",".join(str(made.seed) for made in fine)}
    )


def sheet(pixels: np.ndarray) -> np.ndarray:
    """(N, H, W) as one picture."""
    return grid(torch.from_numpy(pixels)[:, None])


def gif(frames: Sequence[np.ndarray], scale: int) -> bytes:
    """(N, H, W) images at several moments, as an endless picture of their denoising."""
    pictures = [Image.fromarray(enlarged(sheet(frame), scale)) for frame in frames]
    buffer = io.BytesIO()
    durations = [80] * (len(pictures) - 1) + [1500]
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return buffer.getvalue()


def zipped(images: Sequence[Made], scale: int, common: dict[str, str]) -> bytes:
    """PNGs and ``manifest.json``, which also names what failed."""
    buffer, manifest = io.BytesIO(), []
    with zipfile.ZipFile(buffer, "w") as archive:
        for i, made in enumerate(images):
            entry: dict[str, Any] = {"seed": made.seed, "label": made.label}
            if made.pixels is None:
                entry["error"] = made.error
            else:
                data, name = png(made, scale), f"{i:03d}-label{made.label}-seed{made.seed}.png"
                entry |= {"file": name, "sha256": hashlib.sha256(data).hexdigest()}
                archive.writestr(zipfile.ZipInfo(name, EPOCH), data)
            manifest.append(entry)
        told = json.dumps({"parameters": common, "images": manifest}, indent=1)
        archive.writestr(zipfile.ZipInfo("manifest.json", EPOCH), told)
    return buffer.getvalue()
