"""Maps of latent spaces side by side, coloured by class, with images where points cluster."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm_ray.latents.maps import crowded

CELLS = 22
DPI = 120
INCHES = 8.5
LEGEND = 30  # names that fit beside a map


@dataclass(frozen=True, kw_only=True)
class Panel:
    """points (N, 2), labels (N,), images (N, H, W) uint8 of the ``tests`` test images, then of those made."""

    title: str
    points: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    tests: int


def draw(panels: Sequence[Panel], class_names: Sequence[str], thumbnails: bool, text: dict[str, str]) -> bytes:
    """The picture as PNG bytes with text entries."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    width = INCHES * len(panels) + 1.5
    figure = Figure(figsize=(width, INCHES), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    colours = colours_of(len(class_names))
    for panel, axis in zip(panels, axes[0], strict=True):
        scatter(axis, panel, colours)
        if thumbnails:
            show_images(axis, panel, colours)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    handles = [Line2D([], [], color=colours[i], marker="o", linestyle="", label=n) for i, n in enumerate(class_names)]
    handles = handles[:LEGEND]
    if any(panel.tests < len(panel.points) for panel in panels):
        handles += [
            Line2D([], [], color="grey", marker="o", linestyle="", label="test image"),
            Line2D([], [], color="grey", marker="x", linestyle="", label="generated"),
        ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None, **text})
    return buffer.getvalue()


def colours_of(count: int) -> np.ndarray:
    """(count, 4) RGBA, as different as so many can be."""
    from matplotlib import colormaps

    if count <= 20:
        return colormaps["tab10" if count <= 10 else "tab20"](np.arange(count))
    return colormaps["gist_rainbow"](np.linspace(0, 1, count))


def scatter(axis: Any, panel: Panel, colours: np.ndarray) -> None:
    parts = (slice(0, panel.tests), "o", 7), (slice(panel.tests, None), "x", 14)
    for rows, marker, size in parts:
        points, shade = panel.points[rows], colours[panel.labels[rows]]
        line = 0.0 if marker == "o" else 0.7
        axis.scatter(points[:, 0], points[:, 1], s=size, c=shade, marker=marker, linewidths=line, alpha=0.55)
    axis.set_aspect("equal")
    axis.margins(0.03)


def show_images(axis: Any, panel: Panel, colours: np.ndarray) -> None:
    """The image of a point in each crowded cell, its ink in a darker shade of its class's colour on a pale one."""
    spread = float(np.ptp(panel.points, axis=0).max())
    half = 0.45 * spread / CELLS
    limits = axis.get_xlim(), axis.get_ylim()
    for row in crowded(panel.points, CELLS):
        x, y = panel.points[row]
        ink = panel.images[row][..., None] / 255
        colour = colours[panel.labels[row]][:3]
        shade: Any = (1 - ink) * (0.85 + 0.15 * colour) + ink * 0.6 * colour
        where = x - half, x + half, y - half, y + half
        axis.imshow(shade, extent=where, zorder=3, aspect="equal", interpolation="antialiased")
    axis.set_xlim(limits[0])
    axis.set_ylim(limits[1])
