"""The pictures of a search: ticks that tell values apart, words that do not lie on each other."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from ldm_ray.search import pictures
from ldm_ray.search.records import SearchPaths, Trial


def trials_of(values: dict[str, list[Any]], count: int = 30) -> list[Trial]:
    """Trials with each setting drawn from its values."""
    drawn = random.Random(3)
    made = []
    for number in range(count):
        settings = {name: drawn.choice(choices) for name, choices in values.items()}
        base = drawn.uniform(0.5, 4)
        curve = [{"epoch": e, "objective": base + 1 / e, "val_loss": 1 / e, "seconds": 1.0} for e in range(1, 4)]
        made.append(Trial(number, settings, drawn.choice(["finished", "stopped"]), curve))
    return made


NARROW: dict[str, list[Any]] = {"lr": [1e-3 * (1 + i / 1000) for i in range(0, 300, 7)]}
WIDE: dict[str, list[Any]] = {
    "lr": [10 ** (-4 + i / 10) for i in range(20)],
    "beta_start": [10 ** (-5 + i / 10) for i in range(20)],
    "beta_end": [0.007 * 1.05**i for i in range(50)],
    "beta_schedule": ["linear", "scaled_linear"],
    "batch_size": [128, 256, 512],
    "ema_decay": [0.0, 0.99, 0.999],
    "hidden_dim": [64, 96, 128, 160, 192, 224, 256, 288],
}


@pytest.mark.parametrize("values", [NARROW, WIDE, {"lr": [1e-3, 2e-3]}, {"weight_decay": [i / 10 for i in range(9)]}])
@pytest.mark.parametrize("picture", ["objective", "parallel", "curves"])
def test_ticks_differ_and_words_do_not_overlap(picture: str, values: dict[str, list[Any]]) -> None:
    trials = sorted(trials_of(values), key=pictures.score)
    draw = getattr(pictures, picture)
    figure = draw(trials) if picture == "parallel" else draw(trials, 0.1)
    figure.set_dpi(pictures.DPI)
    figure.canvas.draw()
    for panel in figure.axes:
        if not panel.get_visible():
            continue
        ticks = [tick for tick in panel.get_xticklabels() if tick.get_text()]
        low, high = sorted(panel.get_xlim())
        ticks = [tick for tick in ticks if low <= tick.get_position()[0] <= high]
        assert len({tick.get_text() for tick in ticks}) == len(ticks), [tick.get_text() for tick in ticks]
        for words in (ticks, panel.texts):
            boxes = [text.get_window_extent() for text in words]
            pairs = itertools.combinations(zip(words, boxes, strict=True), 2)
            clashes = [(a.get_text(), b.get_text()) for (a, one), (b, other) in pairs if one.overlaps(other)]
            assert clashes == [], clashes


def test_a_few_values_have_a_place_each_and_ticks_are_round() -> None:
    place, ticks = pictures.scale_of(pictures.new_figure(4, 4).subplots(), [512, 128, 256, 128])
    assert ticks == [128, 256, 512] and [place(value) for value in ticks] == [0, 1, 2]
    assert pictures.ticks_of([0.00011, 0.00912]) == [0.0001, 0.0003, 0.001, 0.003, 0.009]
    assert len(set(pictures.ticks_of([1.04e-3, 1.29e-3]))) == pictures.TICKS and pictures.ticks_of([2.0]) == [2.0]


def test_every_picture_is_written(tmp_path: Any) -> None:
    written = pictures.draw(SearchPaths(tmp_path), trials_of(WIDE, 8), 0.1, 100)
    assert sorted(path.name for path in written) == ["curves.png", "objective.png", "parallel.png", "schedules.png"]
