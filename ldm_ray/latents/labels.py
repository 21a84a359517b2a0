"""A grid of images with words beside its rows and above its columns. H height, W width."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP, HEAD, INK, GROUND = 6, 16, 220, 24  # pixels around a word, height above the grid, shades
LONGEST = 240  # pixels of a row's words; longer ones are cut


def labelled(picture: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> np.ndarray:
    """(H', W') uint8: a grid (H, W) uint8 of as many rows and columns, at the right bottom of what is added.

    Where all columns' words would run into each other, every second or third column has its words.
    """
    font = ImageFont.load_default(10)
    names = [cut(name, font) for name in rows]
    left = int(max((font.getlength(name) for name in names), default=0)) + 2 * GAP
    head = HEAD if any(columns) else 0
    canvas = np.full((head + picture.shape[0], left + picture.shape[1]), GROUND, dtype=np.uint8)
    canvas[head:, left:] = picture
    drawn = Image.fromarray(canvas)
    pen = ImageDraw.Draw(drawn)
    for number, name in enumerate(names):
        pen.text((GAP, head + picture.shape[0] * (number + 0.5) / len(names)), name, INK, font, anchor="lm")
    cell = picture.shape[1] / max(1, len(columns))
    widest = max((font.getlength(name) for name in columns), default=0) + 4
    for number in range(0, len(columns), max(1, int(-(-widest // cell)))):
        pen.text((left + cell * (number + 0.5), head / 2), columns[number], INK, font, anchor="mm")
    return np.asarray(drawn)


def cut(name: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The words, or their beginning where they are too long."""
    while name and font.getlength(name) > LONGEST:
        name = name[:-2] + "…"
    return name
