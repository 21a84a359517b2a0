"""Images of several checkpoints beside each other, a panel each. N images, H height, W width."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ldm_ray.data.images import enlarged, grid

SCALE, GAP, HEAD = 2, 16, 22  # enlargement, pixels between panels, room for a panel's name


def side_by_side(panels: Sequence[tuple[str, Tensor, int]]) -> np.ndarray:
    """(H', W', 3) uint8 of panels: a name, images (N, 1, H, W) uint8, the number of their columns."""
    grids = [(name, enlarged(grid(images, columns), SCALE)) for name, images, columns in panels]
    width = sum(panel.shape[1] for _, panel in grids) + GAP * (len(grids) - 1)
    canvas = np.full((HEAD + max(panel.shape[0] for _, panel in grids), width, 3), 24, dtype=np.uint8)
    places, left = [], 0
    for _, panel in grids:
        canvas[HEAD : HEAD + panel.shape[0], left : left + panel.shape[1]] = panel[..., None]
        places.append(left)
        left += panel.shape[1] + GAP
    drawn = Image.fromarray(canvas)
    pen = ImageDraw.Draw(drawn)
    for (name, panel), left in zip(grids, places, strict=True):
        fits = max(1, panel.shape[1] // 6)  # letters of Pillow's own font
        pen.text((left + 4, 5), name if len(name) <= fits else "…" + name[1 - fits :], fill=(220, 220, 220))
    return np.asarray(drawn)
