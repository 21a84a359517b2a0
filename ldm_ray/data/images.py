"""Images as uint8, as float, as PNG bytes, as a grid.

Shapes: N images, H height, W width. ``uint8`` images are (N, 1, H, W) in 0..255, ``float`` ones in [0, 1].
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import GifImagePlugin, Image
from torch import Tensor

from ldm_ray.files.paths import AnyPath, write_bytes
from ldm_ray.settings.errors import DataError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
STORED_UP_TO = 4096  # bytes of pixels


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [0, 1], any shape."""
    return images.to(torch.float32) / 255


def to_uint8(images: Tensor) -> Tensor:
    """float in [0, 1] to uint8 by rounding to nearest, values outside clipped; any shape."""
    return images.clamp(0, 1).mul_(255).add_(0.5).to(torch.uint8)


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
    return encode_pngs(image[None], text)[0]


def encode_pngs(images: np.ndarray, text: dict[str, str] | None = None) -> list[bytes]:
    """(N, H, W) or (N, H, W, 3) uint8 to N times PNG bytes, which depend on the pixels and the text alone.

    Small images are not compressed: that takes a tenth of the time, the bytes are the same with every version of
    zlib, and what files of them are compressed with afterwards does better than zlib per image. Rows are not
    filtered, which for digits is smaller than with any filter.
    """
    count, height, width = images.shape[:3]
    rows = np.zeros((count, height, 1 + images[0, 0].size), dtype=np.uint8)  # each row begins with its filter: none
    rows[:, :, 1:] = images.reshape(count, height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if images.ndim == 4 else 0, 0, 0, 0)
    entries = b"".join(png_text(key, value) for key, value in (text or {}).items())
    start, end = SIGNATURE + png_chunk(b"IHDR", header) + entries, png_chunk(b"IEND", b"")
    pack = stored if rows[0].size <= STORED_UP_TO else zlib.compress
    return [start + png_chunk(b"IDAT", pack(row.tobytes())) + end for row in rows]


def stored(data: bytes) -> bytes:
    """Up to 65,535 bytes as a zlib stream (RFC 1950 and 1951) of one block without compression."""
    size = struct.pack("<HH", len(data), len(data) ^ 0xFFFF)
    return b"\x78\x01\x01" + size + data + zlib.adler32(data).to_bytes(4, "big")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(data, zlib.crc32(kind)).to_bytes(4, "big")


def png_text(key: str, value: str) -> bytes:
    """A text entry: Latin-1, or UTF-8 where that does not do."""
    name = key.encode("latin-1") + b"\0"
    try:
        return png_chunk(b"tEXt", name + value.encode("latin-1"))
    except UnicodeEncodeError:
        return png_chunk(b"iTXt", name + b"\0\0\0\0" + value.encode())


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


def save_grid(images: Tensor, path: AnyPath, columns: int | None = None, text: dict[str, str] | None = None) -> None:
    """Writes the grid of (N, 1, H, W) uint8 images as a PNG, at once or not at all."""
    write_bytes(path, encode_png(grid(images, columns), text))


def save_gif(frames: Sequence[np.ndarray], path: AnyPath, milliseconds: int = 80, last: int = 1500) -> None:
    """Writes (H, W) uint8 frames as an endless GIF; the last frame stays for ``last`` milliseconds."""
    write_bytes(path, b"".join(gif_parts(frames, 1, milliseconds, last)))


def gif_parts(
    frames: Sequence[np.ndarray], scale: int = 1, milliseconds: int = 80, last: int = 1500
) -> Iterator[bytes]:
    """The bytes of the same GIF, a frame at a time, with every pixel repeated scale × scale times.

    A frame holds the rectangle in which it differs from the one before; frames that do not differ prolong it.
    """
    height, width = frames[0].shape
    gray = bytes(level for level in range(256) for _ in range(3))
    yield b"GIF89a" + struct.pack("<HHBBB", width * scale, height * scale, 0xF7, 0, 0) + gray
    yield b"!\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00"  # without end
    durations = [milliseconds] * (len(frames) - 1) + [last]
    shown, box, duration = frames[0], (0, 0, height, width), 0
    for frame, lasting in zip(frames, durations, strict=True):
        if not np.array_equal(frame, shown):
            yield gif_frame(shown, box, duration, scale)
            rows, columns = np.nonzero((frame != shown).any(axis=1))[0], np.nonzero((frame != shown).any(axis=0))[0]
            box = (int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
            shown, duration = frame, 0
        duration += lasting
    yield gif_frame(shown, box, duration, scale)
    yield b";"


def gif_frame(frame: np.ndarray, box: tuple[int, int, int, int], milliseconds: int, scale: int) -> bytes:
    """The rectangle (top, left, bottom, right) of a (H, W) uint8 frame as a block of a GIF of 256 levels of gray."""
    top, left, bottom, right = box
    picture = Image.fromarray(enlarged(frame[top:bottom, left:right], scale))
    offset = (left * scale, top * scale)
    return b"".join(GifImagePlugin.getdata(picture, offset, duration=min(milliseconds, 655_350)))


def enlarged(pixels: np.ndarray, scale: int) -> np.ndarray:
    """(…, H, W) with every pixel repeated scale × scale times."""
    return pixels if scale == 1 else pixels.repeat(scale, axis=-2).repeat(scale, axis=-1)
