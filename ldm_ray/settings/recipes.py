"""What ``--recipe`` stands for: the defaults of the settings that are not named. Why these: docs/experiments.md."""

from __future__ import annotations

from typing import Any

from ldm_ray.settings.diffusion import BETAS

RECIPES = ("best", "classic")
COLUMNS = (("best", "latent"), ("classic", "latent"), ("best", "pixel"), ("classic", "pixel"))
Table = dict[str, tuple[Any, ...]]  # of each setting, its default in every column
# fmt: off
AUTOENCODER: Table = {
    #                   best                 classic
    "epochs":          (40,                  20),
    "batch_size":      (128,                 128),
    "lr":              (4e-3,                1e-3),
    "lr_schedule":     ("cosine",            "cosine"),
}
DENOISER: Table = {
    #                   best                 classic     best, pixel     classic, pixel
    "epochs":          (60,                  20,         20,             20),
    "batch_size":      (512,                 128,        128,            128),
    "lr":              (2e-3,                2e-4,       1e-3,           2e-4),
    "lr_schedule":     ("cosine",            "constant", "cosine",       "constant"),
    "beta_start":      (BETAS[0],            BETAS[0],   BETAS[0],       BETAS[0]),
    "beta_end":        (BETAS[1],            BETAS[1],   BETAS[1],       BETAS[1]),
    "beta_schedule":   ("squaredcos_cap_v2", "linear",   "linear",       "linear"),
    "prediction_type": ("v_prediction",      "epsilon",  "v_prediction", "epsilon"),
    "hidden_dim":      (256,                 256,        32,             32),
    "whiten":          (True,                False,      False,          False),
    "stratified":      (True,                False,      True,           False),
    "ema_decay":       (0.999,               0.0,        0.999,          0.0),
}
# fmt: on


def defaults(table: Table, recipe: Any, space: Any = "latent") -> dict[str, Any]:
    """The column of a recipe in a space; nothing where there is no such column."""
    if (recipe, space) not in COLUMNS:
        return {}
    column = COLUMNS.index((recipe, space))
    return {name: row[column] for name, row in table.items()}


def stated(row: tuple[Any, ...]) -> str:
    """A row as ``--help`` shows it: one value, or that of each recipe and of pixels where those have another."""
    if len(set(row)) == 1:
        return str(row[0])
    cells = [
        (recipe if space == "latent" else f"{recipe}, {space}", row[i])
        for i, (recipe, space) in enumerate(COLUMNS[: len(row)])
    ]
    return "; ".join(f"{name}: {value}" for i, (name, value) in enumerate(cells) if i < 2 or value != row[i - 2])
