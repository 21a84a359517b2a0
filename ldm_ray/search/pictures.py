"""What a search found, as PNG: objective against settings, schedules, parallel coordinates, learning curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.search.records import SearchPaths, Trial
from ldm_ray.search.space import DEFAULTS
from ldm_ray.settings.diffusion import BETA_SCHEDULES, canonical

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEST = 5
FEW, TICKS = 6, 5  # values up to which each has a place of its own, and ticks of an axis of more
SHAPES = dict(zip(BETA_SCHEDULES, "o^s", strict=True))
COLOURS = "viridis_r"
DPI = 110


def draw(paths: SearchPaths, trials: Sequence[Trial], floor: float, num_train_timesteps: int) -> list[Path]:
    """Draws every picture that the scored trials allow; the files written. floor: what real latents score."""
    scored = sorted((trial for trial in trials if trial.objective is not None), key=lambda trial: score(trial))
    if not scored:
        return []
    pictures: dict[str, Callable[[], Any]] = {
        "objective": lambda: objective(scored, floor),
        "schedules": lambda: schedules(scored[:BEST], num_train_timesteps),
        "parallel": lambda: parallel(scored),
        "curves": lambda: curves(scored, floor),
    }
    made = []
    for name, picture in pictures.items():
        figure = picture()
        figure.savefig(paths.picture(name), dpi=DPI)
        made.append(paths.picture(name))
    return made


def score(trial: Trial) -> float:
    assert trial.objective is not None
    return trial.objective


def varied(trials: Sequence[Trial]) -> list[str]:
    """The settings with more than one value, where they have an effect."""
    used = [canonical(trial.settings) for trial in trials]
    return [name for name in trials[0].settings if len({each[name] for each in used if name in each}) > 1]


def colours_of(trials: Sequence[Trial]) -> Any:
    from matplotlib.colors import LogNorm

    scores = [score(trial) for trial in trials]
    low, high = max(min(scores), 1e-9), max(scores)
    return LogNorm(low, max(high, low * 1.01))


def new_figure(width: float, height: float) -> Figure:
    """Inches. matplotlib is imported where it draws: it looks for fonts and writes what it found at home."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def objective(trials: Sequence[Trial], floor: float) -> Any:
    """A panel for each number that varies: the objective against it; filled where the trial had all its epochs."""
    from matplotlib.lines import Line2D

    names = [name for name in varied(trials) if not isinstance(trials[0].settings[name], str)] or ["lr"]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(4.6 * columns, 3.9 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel, name in zip(panels.flat, names, strict=False):
        shown = [trial for trial in trials if name in canonical(trial.settings)]
        values = [trial.settings.get(name, getattr(DEFAULTS, name)) for trial in shown]
        place, ticks = scale_of(panel, values)
        for shape, marker in SHAPES.items():
            for whole in (True, False):
                part = [
                    trial
                    for trial in shown
                    if trial.settings.get("beta_schedule", DEFAULTS.beta_schedule) == shape
                    and (trial.status == "finished") == whole
                ]
                colour = f"C{list(SHAPES).index(shape)}"
                panel.scatter(
                    [place(trial.settings.get(name, getattr(DEFAULTS, name))) for trial in part],
                    [score(trial) for trial in part],
                    marker=marker,
                    facecolors=colour if whole else "none",
                    edgecolors=colour,
                )
        panel.set_xticks([place(value) for value in ticks], [f"{value:g}" for value in ticks])
        panel.margins(x=0.1)
        panel.axhline(floor, color="grey", linestyle=":", linewidth=1)
        panel.set_yscale("log")
        panel.set_xlabel(name)
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    for row in panels:
        row[0].set_ylabel("class-wise Fréchet distance")
    used = {trial.settings.get("beta_schedule", DEFAULTS.beta_schedule) for trial in trials}
    handles = [
        Line2D([], [], color=f"C{i}", marker=marker, linestyle="", label=shape)
        for i, (shape, marker) in enumerate(SHAPES.items())
        if shape in used
    ]
    handles += [
        Line2D([], [], color="grey", marker="o", linestyle="", label="all epochs"),
        Line2D([], [], color="grey", marker="o", linestyle="", fillstyle="none", label="stopped early"),
        Line2D([], [], color="grey", linestyle=":", label="real latents"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2 if columns == 1 else 6, fontsize=8, frameon=False)
    return figure


def scale_of(panel: Axes, values: Sequence[float]) -> tuple[Callable[[float], float], list[float]]:
    """(value → place, the values that get a tick) of a panel's first axis, which becomes logarithmic where that suits.

    A few values have a place each, evenly; a few apart are told of many.
    """
    from matplotlib.ticker import NullLocator

    known = sorted(set(values))
    if len(known) <= FEW:
        return lambda value: float(known.index(value)), known
    if known[0] > 0:
        panel.set_xscale("log")
        panel.xaxis.set_minor_locator(NullLocator())
    return float, ticks_of(known)


def ticks_of(values: Sequence[float]) -> list[float]:
    """Round numbers from about the least of the values to about the greatest, evenly apart by the logarithm where all
    are positive, no two of them the same."""
    low, high = min(values), max(values)
    evenly = np.geomspace(low, high, TICKS) if low > 0 else np.linspace(low, high, TICKS)
    for digits in range(1, 16):
        ticks = [float(f"{value:.{digits}g}") for value in evenly]
        if len(set(ticks)) == TICKS and all(
            abs(t - v) <= 0.15 * (high - low) for t, v in zip(ticks, evenly, strict=True)
        ):
            return ticks
    return [low, high] if high > low else [low]


def schedules(best: Sequence[Trial], num_train_timesteps: int) -> Any:
    """ᾱ and half the log SNR over time, of the best trials and of the default."""
    figure = new_figure(11.5, 4)
    left, right = figure.subplots(1, 2)
    lines = [
        (f"trial {trial.number}: {score(trial):.3f}", schedule_of(trial.settings, num_train_timesteps))
        for trial in best
    ]
    for label, schedule in [*lines, ("default", schedule_of({}, num_train_timesteps))]:
        alphas_cumprod = schedule.alphas_cumprod.numpy()
        style: dict[str, Any] = {"color": "black", "linestyle": "--"} if label == "default" else {}
        text = label if label == "default" else f"{label}, {schedule.beta_schedule}"
        left.plot(alphas_cumprod, label=text, **style)
        right.plot(np.log(alphas_cumprod / (1 - alphas_cumprod)) / 2, **style)
    left.set_ylabel("ᾱ")
    right.set_ylabel("½ log SNR")
    for panel in (left, right):
        panel.set_xlabel("timestep")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


def schedule_of(settings: dict[str, Any], num_train_timesteps: int) -> NoiseSchedule:
    """The schedule of a trial; what it does not set has the default."""
    names = ("beta_start", "beta_end", "beta_schedule")
    known = canonical({name: settings.get(name, getattr(DEFAULTS, name)) for name in names})
    return NoiseSchedule(num_train_timesteps, **known)


def parallel(trials: Sequence[Trial]) -> Any:
    """A line for each trial across the settings that vary, coloured by its objective; the best in front."""
    names = varied(trials) or list(trials[0].settings)[:1]
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable

    figure = new_figure(2.2 * (len(names) + 1) + 1, 4.4)
    panel = figure.subplots()
    norm, colours = colours_of(trials), colormaps[COLOURS]
    axes = [axis_of([trial.settings[name] for trial in trials if name in canonical(trial.settings)]) for name in names]
    axes.append(axis_of([score(trial) for trial in trials]))
    for trial in reversed(trials):
        effective = canonical(trial.settings)
        heights = [
            place(effective[name]) if name in effective else np.nan
            for (place, _), name in zip(axes, names, strict=False)
        ]
        places = [*bridged(heights), axes[-1][0](score(trial))]
        width = 2.2 if trial in trials[:BEST] else 0.9
        panel.plot(range(len(places)), places, color=colours(norm(score(trial))), linewidth=width)
    for x, (_, ticks) in enumerate(axes):
        panel.axvline(x, color="black", linewidth=0.8)
        for height, text in ticks:
            panel.annotate(
                text,
                (x, height),
                xytext=(3, 0),
                textcoords="offset points",
                fontsize=8,
                va="center",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 0.5},
                zorder=5,
            )
    panel.set_xticks(range(len(axes)), [*names, "objective"])
    panel.set_yticks([])
    panel.set_xlim(-0.1, len(names) + 0.45)
    figure.colorbar(ScalarMappable(norm, COLOURS), ax=panel, label="class-wise Fréchet distance")
    return figure


def bridged(heights: list[float]) -> list[float]:
    """Gaps (settings without effect) filled by a straight line between their neighbours."""
    known = [i for i, height in enumerate(heights) if not np.isnan(height)]
    return np.interp(range(len(heights)), known, [heights[i] for i in known]).tolist() if known else heights


def axis_of(values: list[Any]) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    """(value → height in 0..1, [(height, tick)]): a few values evenly, more of positive numbers by their logarithm."""
    known = sorted(set(values))
    if isinstance(values[0], str) or 1 < len(known) <= FEW:
        places = {value: i / max(1, len(known) - 1) for i, value in enumerate(known)}
        return places.__getitem__, [
            (h, value if isinstance(value, str) else f"{value:.4g}") for value, h in places.items()
        ]
    scale: Callable[[float], float] = np.log if min(values) > 0 else float  # type: ignore[assignment]
    low, high = scale(min(values)), scale(max(values))

    def place(value: float) -> float:
        return float((scale(value) - low) / (high - low)) if high > low else 0.5

    inside = [tick for tick in ticks_of(values) if min(values) < tick < max(values)]
    apart = [tick for tick in inside if 0.1 < place(tick) < 0.9]  # from the ends, which are told exactly
    return place, [(place(value), f"{value:.3g}") for value in sorted({min(values), max(values), *apart})]


def curves(trials: Sequence[Trial], floor: float) -> Any:
    """The objective and the validation loss after each epoch; the validation losses of schedules do not compare."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(11.5, 4)
    left, right = figure.subplots(1, 2)
    for rank, trial in reversed(list(enumerate(trials))):
        style: dict[str, Any] = {"color": "lightgrey", "linewidth": 0.9}
        if rank < BEST:
            style = {"color": f"C{rank}", "linewidth": 2, "label": f"trial {trial.number}: {score(trial):.3f}"}
        line(left, trial, "objective", style)
        line(right, trial, "val_loss", style)
    left.axhline(floor, color="grey", linestyle=":", linewidth=1, label="real latents")
    left.set_yscale("log")
    left.set_ylabel("class-wise Fréchet distance")
    right.set_ylabel("validation loss (each of its own schedule)")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize=8, frameon=False)
    for panel in (left, right):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def line(panel: Axes, trial: Trial, metric: str, style: dict[str, Any]) -> None:
    epochs = [point["epoch"] for point in trial.curve]
    panel.plot(epochs, [point[metric] for point in trial.curve], marker=".", **style)
    panel.set_xlabel("epoch")
