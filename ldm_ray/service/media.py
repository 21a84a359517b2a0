"""Images as a client asks for them: JSON, PNG, GIF, npy, zip. Same images, same bytes.

What may be large comes in parts, so that whoever encodes it can stop, or let others pass, between two of them.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ldm_ray.data.images import encode_png, enlarged, gif_parts, grid
from ldm_ray.engine.items import Made, item, png
from ldm_ray.service.errors import ApiError

JSON, PNG, GIF, NPY, ZIP = "application/json", "image/png", "image/gif", "application/x-npy", "application/zip"
KINDS = (JSON, PNG, GIF, NPY, ZIP)
GIF_FRAMES = 40
EPOCH = (1980, 1, 1, 0, 0, 0)  # the same bytes whenever a zip is made


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


def stack(images: Sequence[Made]) -> np.ndarray:
    """(N, H, W) of those that did not fail."""
    return np.stack([made.pixels for made in images if made.pixels is not None])


def parts(kind: str, images: Sequence[Made], scale: int, common: dict[str, str]) -> Iterator[bytes]:
    """The parts of a PNG (one image, or a grid), an npy (N, H, W) uint8, or a zip of all that did not fail."""
    fine = [made for made in images if made.pixels is not None]
    if kind == NPY:
        yield from npy_parts(stack(fine), scale)
    elif kind == ZIP:
        yield from zip_parts(images, scale, common)
    elif len(fine) == 1:
        yield png(fine[0], scale)
    else:
        seeds = ",".join(str(made.seed) for made in fine)
        yield encode_png(enlarged(sheet(stack(fine)), scale), common | {"seeds": seeds})


def json_parts(head: dict[str, Any], images: Sequence[Made], scale: int) -> Iterator[bytes]:
    """``head`` with the images as its ``data``."""
    yield json.dumps(head, separators=(",", ":"))[:-1].encode() + b',"data":['
    for i, made in enumerate(images):
        yield b"," * (i > 0) + json.dumps(item(made, scale), separators=(",", ":")).encode()
    yield b"]}"


def npy_parts(pixels: np.ndarray, scale: int) -> Iterator[bytes]:
    """(N, H, W) uint8 as ``numpy.save`` writes them when enlarged."""
    count, height, width = pixels.shape
    shape = (count, height * scale, width * scale)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    yield buffer.getvalue()
    for picture in pixels:
        yield enlarged(picture, scale).tobytes()


def sheet(pixels: np.ndarray) -> np.ndarray:
    """(N, H, W) as one picture."""
    return grid(torch.from_numpy(pixels)[:, None])


def film(frames: Sequence[np.ndarray], scale: int) -> Iterator[bytes]:
    """(N, H, W) images at several moments, as the parts of an endless GIF of their denoising."""
    return gif_parts([sheet(frame) for frame in frames], scale)


def zip_parts(images: Sequence[Made], scale: int, common: dict[str, str]) -> Iterator[bytes]:
    """PNGs and ``manifest.json``, which also names what failed; the bytes come at the end."""
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
            yield b""
        told = json.dumps({"parameters": common, "images": manifest}, indent=1)
        archive.writestr(zipfile.ZipInfo("manifest.json", EPOCH), told)
    yield buffer.getvalue()
