"""An evaluation as a table for the terminal and as a picture.

Shapes: M samples, T training images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ldm_ray.data.images import enlarged
from ldm_ray.metrics.floors import FLOOR_A, FLOOR_C
from ldm_ray.metrics.lenet import NUM_CLASSES
from ldm_ray.metrics.neighbours import nearest
from ldm_ray.metrics.quality import Reference

FLOORS = {
    FLOOR_A: "(a) training images",
    "test_decoded": "(b) test images, decoded",
    FLOOR_C: "(c) training images, decoded",
    "gaussian": "(d) one Gaussian",
    "gmm_10": "    10 Gaussians",
    "gmm_100": "    100 Gaussians",
    "ddpm": "(e) DDPM, every timestep",
}
COLUMNS = {  # figure: (heading, digits after the point)
    "fd_lenet": ("FD-LeNet ↓", 2),
    "times_floor": ("x {} ↓", 2),
    "precision": ("precision ↑", 3),
    "recall": ("recall ↑", 3),
    "density": ("density ↑", 3),
    "coverage": ("coverage ↑", 3),
    "accuracy": ("accuracy ↑", 4),
    "nearest_train_ratio": ("to train", 3),
    "close_to_train": ("close", 3),
}
LEGEND = """\
↓ lower is better, ↑ higher is better; no arrow: as with the test images, near floor (b) where there is one
FD-LeNet           Fréchet distance to the test images in a digit classifier's features; compares equal counts alone
x {}              FD-LeNet over that of floor {}
precision, recall  share of the samples that lie among the test images, and of these that lie among the samples
density, coverage  how many test images a sample lies close to, over 5; share of test images with a sample close by
accuracy           share of the samples that another classifier sees as the digit asked for
to train           distance to the nearest training image, over that of the test images; 0: copies
close              share nearer to a training image than 99 % of the test images are; 1: copies"""
WIDTH = 12  # of a column
PAIRS, SCALE, GAP, MARGIN = 8, 2, 6, 56  # pairs a row, enlargement, pixels between pairs, room for the row's name
TINT = np.array([255, 190, 90])  # of the training images in the picture


def table(results: dict[str, Any]) -> str:
    """The floors, then the samples with their standard deviations below, what the columns are, and each digit's."""
    lowest, floor = floor_of(results)
    letter = FLOORS[lowest][:3]
    lines = [" " * 29 + "".join(f"{heading.format(letter):>{WIDTH}}" for heading, _ in COLUMNS.values())]
    lines += [line(FLOORS[name], row, floor) for name, row in results["floors"].items()]
    for row in results["samples"]:
        lines.append(line(f"samples, guidance {row['guidance_scale']:g}", row["mean"], floor))
        if row["sd"]["fd_lenet"] is not None:
            lines.append(line("    ±", row["sd"], floor))
    lines += ["", LEGEND.format(letter, letter)]
    lines += ["", f"{'digit':<29}" + "".join(f"{digit:>8}" for digit in range(NUM_CLASSES))]
    for name, row in [(letter, results["floors"][lowest])] + [
        (f"guidance {row['guidance_scale']:g}", row["mean"]) for row in results["samples"]
    ]:
        share = [count / row["count"] for count in row["histogram"]]
        lines.append(f"{name + ': share seen':<29}" + cells(share, 8, 3))
        lines.append(f"{name + ': accuracy':<29}" + cells(row["accuracy_per_class"], 8, 3))
    return "\n".join(lines)


def floor_of(results: dict[str, Any]) -> tuple[str, float]:
    """(name, FD-LeNet) of the floor that samples are held against: (c), or (a) in pixel space, which has no other."""
    lowest = FLOOR_C if FLOOR_C in results["floors"] else FLOOR_A
    return lowest, results["floors"][lowest]["fd_lenet"]


def line(name: str, row: dict[str, Any], floor: float) -> str:
    row = row | {"times_floor": row["fd_lenet"] / floor if floor else None}
    return f"{name:<29}" + "".join(cells([row.get(figure)], WIDTH, digits) for figure, (_, digits) in COLUMNS.items())


def cells(values: Sequence[float | None], width: int, digits: int) -> str:
    """Right-aligned; a dash for what was not measured."""
    return "".join(f"{'-' if value is None else f'{value:.{digits}f}':>{width}}" for value in values)


def picture(images: Tensor, labels: Tensor, reference: Reference) -> np.ndarray:
    """(H, W, 3) uint8: samples (M, 1, 28, 28) uint8, each with its nearest training image, tinted, at its right.

    One row for each digit asked for; then the samples nearest to a training image, measured by the mean of their
    digit, where copies would show; then samples that the second classifier takes for another digit than the label (M,).
    """
    assert reference.train is not None
    distance, _ = nearest(images.to(reference.train.device), reference.train)
    for digit in labels.unique():  # ones are close to each other, copied or not: compare with their own digit
        distance[labels == digit] /= distance[labels == digit].mean().clamp_min(1e-12)
    wrong = reference.classifiers.classify(images) != labels
    rows = [(str(digit), (labels == digit).nonzero()[:PAIRS, 0]) for digit in range(NUM_CLASSES)]
    rows += [("closest", distance.argsort()[:PAIRS]), ("misread", wrong.nonzero()[:PAIRS, 0])]
    rows = [(name, chosen) for name, chosen in rows if len(chosen)]
    side = images.shape[-1] * SCALE
    canvas = np.full((len(rows) * (side + GAP) + GAP, MARGIN + PAIRS * (2 * side + GAP), 3), 24, dtype=np.uint8)
    for row, (_, chosen) in enumerate(rows):
        _, neighbours = nearest(images[chosen].to(reference.train.device), reference.train)
        top = GAP + row * (side + GAP)
        for column, (sample, neighbour) in enumerate(zip(chosen.tolist(), neighbours.tolist(), strict=True)):
            left = MARGIN + column * (2 * side + GAP)
            canvas[top : top + side, left : left + side] = enlarged(images[sample, 0].cpu().numpy(), SCALE)[..., None]
            beside = enlarged(reference.train[neighbour, 0].cpu().numpy(), SCALE)[..., None].astype(int) * TINT // 255
            canvas[top : top + side, left + side : left + 2 * side] = beside
    drawn = Image.fromarray(canvas)
    pen = ImageDraw.Draw(drawn)
    for row, (name, _) in enumerate(rows):
        pen.text((8, GAP + row * (side + GAP) + side // 2 - 5), name, fill=(220, 220, 220))
    return np.asarray(drawn)
