"""The embedded dataset: scikit-learn's real handwritten digits, brought to MNIST's shape. No network.

The 1,797 scans (8×8, from the UCI optical recognition set) are drawn into a 20×20 box in the middle of
28×28, as MNIST's are. The last 297 are the test split. 1,500 scans are too few for a latent space, so the
train split draws each of them 20 times, slightly turned, sized, slanted and shifted: the same 30,000
images everywhere, from a fixed seed.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from ldm_ray.data.images import encode_png, to_uint8

NUM_TRAIN, COPIES, SIZE, BOX = 1500, 20, 28, 20


def digits_table(split: str) -> pa.Table:
    """The split ("train" or "test") as ``image: struct<bytes, path>``, ``label: int64``."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    chosen = slice(0, NUM_TRAIN) if split == "train" else slice(NUM_TRAIN, None)
    small = torch.from_numpy(scans[chosen]).float().reshape(-1, 1, 8, 8) / 16
    labels = labels[chosen].astype(np.int64)
    if split == "train":
        generator = torch.Generator().manual_seed(1797)
        small, labels = small.repeat(COPIES, 1, 1, 1), np.tile(labels, COPIES)
        turn = warp(len(small), generator)
    else:
        turn = torch.eye(2, 3).repeat(len(small), 1, 1)
    images = to_uint8(draw(small, turn))[:, 0].numpy()
    column = pa.array(
        [{"bytes": encode_png(image), "path": None} for image in images],
        type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    return pa.table({"image": column, "label": pa.array(labels)})


def warp(count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 2, 3) small random affine maps: ±8°, 90–110 % size, ±10 % slant, ±1 pixel."""

    def uniform(scale: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * scale

    angle, slant, size = uniform(0.14), uniform(0.1), 1 + uniform(0.1)
    cos, sin, zoom = angle.cos(), angle.sin(), 1 / size
    shift_x, shift_y = uniform(2 / SIZE), uniform(2 / SIZE)
    rows = [
        torch.stack([zoom * cos, zoom * (slant * cos - sin), shift_x], dim=1),
        torch.stack([zoom * sin, zoom * (slant * sin + cos), shift_y], dim=1),
    ]
    return torch.stack(rows, dim=1)


def draw(small: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """(N, 1, 8, 8) in [0, 1] to (N, 1, 28, 28): smooth enlargement to 20×20, border, affine map, contrast."""
    border = (SIZE - BOX) // 2
    large = F.interpolate(small, size=(BOX, BOX), mode="bicubic", align_corners=False)
    large = F.pad(large, (border,) * 4)
    where = F.affine_grid(turn, [len(small), 1, SIZE, SIZE], align_corners=False)
    turned = F.grid_sample(large, where, mode="bilinear", align_corners=False)
    return (1.4 * turned - 0.2).clamp(0, 1)  # strokes as crisp as MNIST's
