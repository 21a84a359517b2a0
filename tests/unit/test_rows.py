"""Seeds and labels of generated datasets: ranges, rules, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ldm_ray.dataset.rows import Labels, Seeds
from ldm_ray.settings.errors import ConfigError


def test_seeds_are_ranges() -> None:
    seeds = Seeds.parse("7, 0-4,5-9,9,4000000000-4294967295")
    listed = [7, *range(10), 9]
    assert str(seeds) == "7,0-9,9,4000000000-4294967295" and len(seeds) == 12 + 294967296
    assert seeds.rows(0, 12).tolist() == listed and seeds.rows(10, 13).tolist() == [9, 9, 4000000000]
    assert seeds.rows(len(seeds) - 1, len(seeds)).tolist() == [4294967295]
    assert seeds.rows(200_000_000, 200_000_002).tolist() == [4199999988, 4199999989]
    assert str(Seeds.parse("0-0")) == str(Seeds.parse(" 0 - 0 ")) == "0" and len(Seeds.parse("0-0")) == 1
    for bad in ("", "1-", "-1", "3-2", "1,,2", "4294967296", "0-4294967296", "1e3", "9" * 40):
        with pytest.raises(ConfigError, match="--seeds"):
            Seeds.parse(bad)


def test_labels_follow_their_rule(tmp_path: Path) -> None:
    seeds = np.arange(100_000)

    def rows(text: str, first: int = 0, only: int | None = None) -> list[int]:
        return Labels.parse(text, 10, 4, only).rows(first, seeds[:4]).tolist()

    assert rows("balanced", 8) == [8, 9, 0, 1] and rows("7") == [7] * 4 and rows("2-4,9", 3) == [9, 2, 3, 4]
    assert rows("2 - 4, nine", 3) == [9, 2, 3, 4]
    assert rows("balanced", only=3) == rows("random", only=3) == [3] * 4
    drawn = Labels.parse("random", 10, 1).rows(0, seeds)
    assert np.abs(np.bincount(drawn, minlength=10) / 10_000 - 1).max() < 0.05
    assert Labels.parse("random", 10, 1).rows(77, seeds[5:9]).tolist() == drawn[5:9].tolist()
    file = tmp_path / "labels.txt"
    file.write_text("1 2,3\n\n9\n")
    assert rows(f"file:{file}", 1) == [2, 3, 9]
    for text, said in {
        "1 2 3": "3 labels for 4",
        "1 2 3 4 5": "more labels",
        "1 2 3 10": "holds 10",
        "a": "whole",
    }.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            rows(f"file:{file}")
    for text in ("10", "4-2", "cat", "7,cat", "", "-1", "file:/nowhere"):
        with pytest.raises(ConfigError, match="--labels"):
            rows(text)
    with pytest.raises(ConfigError, match="trained on digit 3 alone"):
        rows("0-4", only=3)


def test_long_label_files_are_read_in_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_ray.dataset.rows.CHUNK", 7)
    values = np.random.default_rng(0).integers(0, 12, 500)
    (tmp_path / "l").write_text("\n".join(map(str, values)))
    assert Labels.parse(f"file:{tmp_path / 'l'}", 12, 500).rows(0, np.zeros(500)).tolist() == values.tolist()
