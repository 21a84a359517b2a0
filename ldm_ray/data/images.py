"""Images as uint8, as float, as PNG bytes, as a grid.

Shapes: N images, H height, W width. ``uint8`` images are (N, 1, H, W) in 0..255, ``float`` ones in [0, 1].
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_ray.errors import DataError


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [0, 1], any shape."""
    return images.to(torch.float32) / 255


def to_uint8(images: Tensor) -> Tensor:
    """float in [0, 1] to uint8 by rounding to nearest, values outside clipped; any shape."""
    return images.clamp(0, 1).mul(255).add(0.5).to(torch.uint8)


def decode_png(data: bytes | None, size: tuple[int, int] | None = None, where: str = "an image") -> np.ndarray:
    """PNG (or any format that Pillow reads) to a (H, W) uint8 array.

    Raises DataError when it is no image, is not 8-bit grayscale, or is not of the given (H, W).
    """
    try:
        with Image.open(io.BytesIO(data or b"")) as image:
            if image.mode != "L":
                raise DataError(f"{where} has mode {image.mode}; needed is 8-bit grayscale (mode L): convert it first")
            array = np.asarray(image)
    except DataError:
        raise
    except Exception as error:  # Pillow raises many kinds on a damaged file
        reason = "it is empty" if not data else str(error) or type(error).__name__
        raise DataError(f"{where} cannot be decoded: {reason}") from None
    if size is not None and array.shape != size:
        raise DataError(
            f"{where} is {array.shape[0]}x{array.shape[1]} pixels; needed is {size[0]}x{size[1]}: resize it first"
        )
    return array


def encode_png(image: np.ndarray, text: dict[str, str] | None = None) -> bytes:
    """(H, W) or (H, W, 3) uint8 to PNG bytes, with optional text entries."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def grid(images: Tensor, columns: int | None = None) -> np.ndarray:
    """(N, 1, H, W) uint8 to one (H', W') uint8 picture, as torchvision's make_grid with padding 2
    lays it out (a single image has no border). Written out here because importing torchvision takes over a second."""
    count, _, height, width = images.shape
    if count == 1:
        return images[0, 0].cpu().numpy()
    columns = min(count, columns or max(1, round(count**0.5)))
    picture = np.zeros((-(-count // columns) * (height + 2) + 2, columns * (width + 2) + 2), dtype=np.uint8)
    for i, image in enumerate(images[:, 0].cpu().numpy()):
        top, left = 2 + i // columns * (height + 2), 2 + i % columns * (width + 2)
        picture[top : top + height, left : left + width] = image
    return picture


def save_grid(images: Tensor, path: Path, columns: int | None = None, text: dict[str, str] | None = None) -> None:
    """Writes the grid of (N, 1, H, W) uint8 images as a PNG, at once or not at all."""
    write_bytes(path, encode_png(grid(images, columns), text))


def save_gif(frames: Sequence[np.ndarray], path: Path, milliseconds: int = 80, last: int = 1500) -> None:
    """Writes (H, W) uint8 frames as an endless GIF; the last frame stays for ``last`` milliseconds."""
    pictures = [Image.fromarray(frame) for frame in frames]
    durations = [milliseconds] * (len(pictures) - 1) + [last]
    buffer = io.BytesIO()
    pictures[0].save(buffer, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    write_bytes(path, buffer.getvalue())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)
