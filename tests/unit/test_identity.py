"""Whether the images of a resumed run are those that it was begun with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ldm_ray.data.digits import digits_table
from ldm_ray.data.identity import changes, record_of
from ldm_ray.data.sources import ImageSource, load_source


def staged(folder: Path, cut: int, label: int = 0) -> ImageSource:
    """The same twelve images in two files of another cut; label: of the first."""
    folder.mkdir()
    table = digits_table("test").slice(0, 12)
    labels = pa.array([(table["label"][0].as_py() + label) % 10, *table["label"].to_pylist()[1:]])
    table = table.set_column(1, "label", labels)
    pq.write_table(table.slice(0, cut), folder / "train-0.parquet")
    pq.write_table(table.slice(cut), folder / "train-1.parquet")
    return load_source(str(folder), "train", folder)


def test_the_same_images_elsewhere_are_the_same_data(tmp_path: Path) -> None:
    before = record_of(staged(tmp_path / "a", 5), None)
    copied, cut_anew = staged(tmp_path / "b", 5), staged(tmp_path / "c", 7)
    assert copied.revision != cut_anew.revision
    assert changes(before, record_of(copied, None)) == changes(before, record_of(cut_anew, None)) == []
    hub = dataclasses.replace(copied, name="ylecun/mnist", revision="a commit")
    assert changes(before, record_of(hub, None)) == changes(record_of(hub, None), before) == []


def test_other_images_are_other_data_wherever_they_lie(tmp_path: Path) -> None:
    before = record_of(staged(tmp_path / "a", 5), None)
    (tmp_path / "a").rename(tmp_path / "kept")
    now = record_of(staged(tmp_path / "a", 5, label=1), None)
    [said] = changes(before, now)
    assert said == f"revision {before['revision']} then, {now['revision']} now"
    assert changes(before, before | {"only_digit": 3}) == ["only_digit None then, 3 now"]


def test_records_of_earlier_versions_go_by_the_revision(tmp_path: Path) -> None:
    now = record_of(staged(tmp_path / "a", 5), None)
    before = {key: value for key, value in now.items() if key != "content"}
    assert changes(before | {"dataset": "ylecun/mnist"}, now) == []
    assert changes(before | {"revision": "another"}, now) == [f"revision another then, {now['revision']} now"]
