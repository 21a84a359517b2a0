"""Folders of pictures and of Parquet as people have them: read right or refused, nothing lost in silence."""

from __future__ import annotations

import csv
import io
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm_ray import infer
from ldm_ray.checkpoints import checkpoint
from ldm_ray.data.classes import labels_in, numbered
from ldm_ray.data.sources import ImageSource, load_source, with_bytes
from ldm_ray.dataset.formats import Shard, encode
from ldm_ray.dataset.rows import Labels
from ldm_ray.engine.generator import Generator
from ldm_ray.files.store import Store
from ldm_ray.settings.errors import DataError
from tests.helpers.checkpoints import write_small_checkpoint

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CATS = ("ant", "bee", "cat")


def picture(number: int) -> bytes:
    """A PNG whose first pixel is the number."""
    pixels = np.zeros((6, 4), np.uint8)
    pixels[0, 0] = number
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def place(folder: Path, *names: str) -> Path:
    """Writes files, each of which holds the picture of its position in the names."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))
    return folder


def write_list(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as what the file's name ends in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(list(rows)), file)


def write_parquet(file: Path, labels: Sequence[int | None], names: Sequence[str] | None = None, first: int = 0) -> Path:
    """Rows of the pictures from the first on, with names as the hub's ``ClassLabel`` has them."""
    rows = [{"bytes": picture(first + i), "path": None} for i in range(len(labels))]
    table = pa.table({"image": pa.array(rows, IMAGE), "label": pa.array(labels, pa.int64())})
    if names:
        features = {"label": {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)
    return file


def content(source: ImageSource) -> list[tuple[int, str]]:
    """(the number of the picture, the name of its class) of each row."""
    images, labels = source.decode()
    names = [source.class_names[label] for label in labels.tolist()]
    return list(zip(images[:, 0, 0, 0].tolist(), names, strict=True))


def both(folder: Path) -> dict[int, str]:
    """The same of both splits together."""
    train, test = (load_source(str(folder), split, folder) for split in ("train", "test"))
    assert train.class_names == test.class_names
    return dict(content(train) + content(test))


def refusal(folder: Path, split: str = "train") -> str:
    with pytest.raises(DataError) as error:
        load_source(str(folder), split, folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


# --- pictures ---


@pytest.mark.parametrize(
    "splits", [("train", "test"), ("training", "testing"), ("Train", "Test"), ("data/train", "data/test")]
)
def test_the_folders_of_splits_by_all_their_names(tmp_path: Path, splits: tuple[str, str]) -> None:
    place(tmp_path, f"{splits[0]}/9/a.png", f"{splits[0]}/10/a.png", f"{splits[1]}/9/a.png")
    train, test = (load_source(str(tmp_path), split, tmp_path) for split in ("train", "test"))
    assert content(train) == [(0, "9"), (1, "10")] and content(test) == [(2, "9")]
    assert train.class_names == test.class_names == ("9", "10")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
@pytest.mark.parametrize("labels", [("cat", "ant", "cat"), (1, 0, 1)])
def test_the_hubs_imagefolder(tmp_path: Path, name: str, labels: tuple[str | int, ...]) -> None:
    place(tmp_path, "train/a.png", "train/deeper/b.png", "test/c.png")
    rows = [{"file_name": "a.png", "label": labels[0]}, {"file_name": "deeper/b.png", "label": labels[1]}]
    write_list(tmp_path / "train" / name, rows)
    write_list(tmp_path / "test" / name, [{"file_name": "c.png", "label": labels[2]}])
    names = ("ant", "cat") if isinstance(labels[0], str) else ("0", "1")
    train, test = (load_source(str(tmp_path), split, tmp_path) for split in ("train", "test"))
    assert train.class_names == test.class_names == names
    assert dict(content(train)) == {0: names[1], 1: names[0]} and content(test) == [(2, names[1])]


def test_a_list_above_the_splits_or_without_any(tmp_path: Path) -> None:
    place(tmp_path / "a", "train/0.png", "train/1.png", "test/2.png")
    rows = [{"file_name": f"{split}/{i}.png", "label": CATS[i]} for i, split in enumerate(("train", "train", "test"))]
    write_list(tmp_path / "a" / "metadata.csv", rows)
    assert content(load_source(str(tmp_path / "a"), "train", tmp_path)) == [(0, "ant"), (1, "bee")]
    assert content(load_source(str(tmp_path / "a"), "test", tmp_path)) == [(2, "cat")]

    place(tmp_path / "b", *(f"images/{i}.png" for i in range(60)))
    write_list(tmp_path / "b" / "metadata.jsonl", [{"file_name": f"images/{i}.png", "label": i % 3} for i in range(60)])
    assert both(tmp_path / "b") == {i: str(i % 3) for i in range(60)}


def test_names_of_a_list_in_parquet(tmp_path: Path) -> None:
    place(tmp_path, "train/a.png", "train/b.png")
    table = pa.table({"file_name": ["a.png", "b.png"], "label": [2, 0]})
    info = {"info": {"features": {"label": {"names": list(CATS)}}}}
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(info)}), tmp_path / "train" / "metadata.parquet"
    )
    assert content(load_source(str(tmp_path), "train", tmp_path)) == [(0, "cat"), (1, "ant")]


def test_what_generate_writes_as_pngs_is_read_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = np.zeros((5, 6, 4), np.uint8)
    images[:, 0, 0] = range(5)
    store = Store(str(tmp_path))
    for number, rows in enumerate((slice(0, 3), slice(3, 5))):
        stem = f"train-{number:05d}-of-00002"
        labels = np.array([7, 0, 7, 1, 2])[rows]
        shard = Shard(rows.start, images[rows], np.arange(5)[rows], labels)
        store.write(f"data/{stem}/metadata.jsonl", encode(shard, "png", 10, store, stem))
    (tmp_path / "manifest.json").write_text(json.dumps({"num_classes": 10}))
    place(tmp_path, "preview.png")
    for folder in (tmp_path, tmp_path / "data"):
        caplog.clear()
        source = load_source(str(folder), "train", tmp_path)
        assert content(source) == [(0, "7"), (1, "0"), (2, "7"), (3, "1"), (4, "2")]
        assert "passed over" not in caplog.text
    assert load_source(str(tmp_path), "train", tmp_path).class_names == numbered(10)
    assert "no image for the split 'test'" in refusal(tmp_path, "test")
    (tmp_path / "data" / "train-00001-of-00002" / "metadata.jsonl").unlink()
    assert "did not finish" in refusal(tmp_path)
    shutil.rmtree(tmp_path / "data" / "train-00001-of-00002")
    assert "has 1 of 2 shards" in refusal(tmp_path)


def test_pictures_passed_over_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pngs = [f"{split}/{name}/{i}.png" for split in ("train", "test") for name in "ab" for i in range(2)]
    place(tmp_path, *pngs, "train/a/0.jpg", "train/b/1.JPG", "train/b/x.bmp", "train/a/deeper/y.png", "train/notes.txt")
    (tmp_path / "train" / "dog").mkdir()
    with caplog.at_level(logging.INFO):
        assert len(load_source(str(tmp_path), "train", tmp_path)) == 4
    assert "4 of 12 pictures passed over (2 .jpg, 1 .bmp, 1 .png), such as train/a/0.jpg" in caplog.text
    assert "no picture in dog" in caplog.text


def test_an_unlabelled_test_split_does_not_hinder_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place(tmp_path, "train/a/0.png", "train/b/1.png", "test/x.png", "test/y.png")
    assert content(load_source(str(tmp_path), "train", tmp_path)) == [(0, "a"), (1, "b")]
    assert "2 of 4 pictures passed over" in caplog.text
    assert "in no folder of a class" in refusal(tmp_path, "test")


def test_nothing_is_said_of_a_folder_that_is_read_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place(tmp_path, "train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/0.png", ".hidden/x.png")
    assert len(both(tmp_path)) == 4 and not caplog.records


def a_list(*rows: dict[str, Any], name: str = "metadata.jsonl") -> Callable[[Path], object]:
    """A split of two pictures, a.png and b.png, with a list."""

    def make(folder: Path) -> None:
        place(folder, "train/a.png", "train/b.png")
        write_list(folder / "train" / name, rows)

    return make


FINE = {"file_name": "a.png", "label": 1}
PICTURES: dict[str, tuple[Callable[[Path], object], str]] = {
    "labels in names": (
        lambda f: place(f, "train/7_0.png", "train/1_0.png", "test/3_0.png"),
        "in no folder of a class",
    ),
    "no splits, no classes": (lambda f: place(f, "7_0.png", "1_0.png"), "(1_0.png) in no folder of a class"),
    "splits by other names": (
        lambda f: place(f, "train_images/a.png", "test_images/b.png"),
        "do not look like classes",
    ),
    "sets": (lambda f: place(f, "trainingSet/a.png", "testSet/b.png"), "do not look like classes"),
    "one heap": (lambda f: place(f, "images/a.png", "images/b.png"), "do not look like classes"),
    "heaps in splits": (lambda f: place(f, "train/images/a.png", "test/images/b.png"), "do not look like classes"),
    "a split twice": (lambda f: place(f, "train/a/0.png", "training/a/0.png"), "has train and training"),
    "wrapped": (lambda f: place(f, "mnist/training/0/a.png"), "elsewhere (mnist/training/0/a.png)"),
    "too deep": (lambda f: place(f, "train/x/0/a.png", "train/x/1/a.png"), "elsewhere (x/0/a.png)"),
    "a class without PNGs": (lambda f: place(f, "train/a/0.png", "train/b/0.jpg"), "has no PNG, and 1 .jpg"),
    "JPEG alone": (lambda f: place(f, "train/a/0.jpg", "train/b/0.jpg"), "has no PNG, and 1 .jpg"),
    "two lists": (
        lambda f: [a_list(FINE)(f), a_list(FINE, name="metadata.csv")(f)],
        "has metadata.csv and metadata.jsonl",
    ),
    "no label column": (a_list({"file_name": "a.png", "text": "x"}), "has no column 'label'"),
    "a row without": (a_list(FINE, {"file_name": "b.png"}), "row 1 of .* has no column 'label'"),
    "null label": (a_list(FINE, {"file_name": "b.png", "label": None}), "row 1 of .* (b.png) has no label"),
    "no number": (a_list(FINE, {"file_name": "b.png", "label": 1.5}), "row 1 of .* (b.png) has no label"),
    "true": (a_list({"file_name": "a.png", "label": True}), "row 0 of .* (a.png) has no label"),
    "empty in CSV": (
        a_list(FINE, {"file_name": "b.png", "label": ""}, name="metadata.csv"),
        "row 1 of .* has no label",
    ),
    "no file name": (a_list({"file_name": None, "label": 1}), "row 0 of .* has no file_name"),
    "lost": (a_list({"file_name": "c.png", "label": 1}), "c.png is not there"),
    "twice": (a_list(FINE, FINE | {"label": 0}), "row 1 of .* lists a.png a second time"),
    "outside": (a_list({"file_name": "../../a.png", "label": 1}), "is no file under"),
    "absolute": (a_list({"file_name": "/etc/passwd", "label": 1}), "is no file under"),
    "label -1": (a_list(FINE | {"label": -1}), "labels from -1 to -1"),
    "a split column": (
        a_list(FINE | {"split": "train"}, {"file_name": "b.png", "label": 1, "split": "test"}),
        "'split'",
    ),
    "no JSON": (lambda f: [place(f, "train/a.png"), (f / "train/metadata.jsonl").write_text("{")], "cannot be read"),
    "no object": (lambda f: [place(f, "train/a.png"), (f / "train/metadata.jsonl").write_text("7")], "cannot be read"),
    "no UTF-8": (
        lambda f: [place(f, "train/a.png"), (f / "train/metadata.csv").write_bytes(b"\xff")],
        "cannot be read",
    ),
    "no Parquet": (
        lambda f: [place(f, "train/a.png"), (f / "train/metadata.parquet").write_bytes(b"x")],
        "cannot be read",
    ),
}


@pytest.mark.parametrize("case", PICTURES)
def test_folders_of_pictures_that_are_refused(tmp_path: Path, case: str) -> None:
    make, words = PICTURES[case]
    make(tmp_path)
    message = refusal(tmp_path)
    for part in words.split(".*"):
        assert part.strip() in message


def test_folders_behind_links_and_a_loop_of_them(tmp_path: Path) -> None:
    """As data that was staged elsewhere is linked to."""
    place(tmp_path / "elsewhere" / "pictures", "a/0.png", "b/1.png")
    write_parquet(tmp_path / "elsewhere" / "parquet" / "0.parquet", [0, 0])
    for name, wanted in (("pictures", [(0, "a"), (1, "b")]), ("parquet", [(0, "0"), (1, "0")])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train").symlink_to(tmp_path / "elsewhere" / name)
        (folder / "loop").symlink_to(folder)
        assert content(load_source(str(folder), "train", tmp_path)) == wanted


# --- Parquet ---

PARQUET: dict[str, tuple[Callable[[Path], object], str]] = {
    "two configurations": (
        lambda f: [write_parquet(f / each / "train-00000-of-00001.parquet", [0]) for each in ("mnist", "fashion")],
        "several datasets or configurations (fashion, mnist)",
    ),
    "one split each": (
        lambda f: [write_parquet(f / each / f"{each}-0.parquet", [0]) for each in ("train", "test")],
        "several datasets or configurations (test, train)",
    ),
    "a second copy": (
        lambda f: [write_parquet(f / f"train-00000-of-00001{end}.parquet", [0]) for end in ("", " (1)")],
        "train-00000-of-00001 (1).parquet",
    ),
    "a changed second copy": (
        lambda f: [write_parquet(f / f"train{end}.parquet", [i]) for i, end in enumerate(("-0", "-0 (1)"))],
        "train-0 (1).parquet is a second copy of train-0.parquet",
    ),
    "a copy": (
        lambda f: [write_parquet(f / f"train{end}.parquet", [i]) for i, end in enumerate(("-0", "-0 - Copy"))],
        "train-0 - Copy.parquet is a second copy of train-0.parquet",
    ),
    "a copy by another name": (
        lambda f: [write_parquet(f / f"train-{name}.parquet", [0]) for name in "ab"],
        "train-b.parquet has the same bytes as train-a.parquet",
    ),
    "a lost shard": (lambda f: write_parquet(f / "train-00000-of-00002.parquet", [0]), "has 1 of 2 shards"),
    "two writings": (
        lambda f: [write_parquet(f / f"train-00000-of-0000{n}.parquet", [n]) for n in (1, 2)],
        "shards of two datasets",
    ),
    "a stranger": (
        lambda f: [write_parquet(f / f"train-{n}.parquet", [i]) for i, n in enumerate(("00000-of-00001", "new"))],
        "train-new.parquet is none of the shards",
    ),
    "another order of classes": (
        lambda f: [
            write_parquet(f / "train-0.parquet", [0, 1, 2], CATS),
            write_parquet(f / "test-0.parquet", [0, 1, 2], CATS[::-1]),
        ],
        "train-0.parquet has the classes ant, bee, cat, test-0.parquet cat, bee, ant",
    ),
    "another order within a split": (
        lambda f: [write_parquet(f / f"train-{i}.parquet", [i], CATS[:: 1 - 2 * i]) for i in range(2)],
        "train-0.parquet has the classes ant, bee, cat, train-1.parquet cat, bee, ant",
    ),
    "a file without labels": (
        lambda f: [
            write_parquet(f / "train-0.parquet", [0]),
            pq.write_table(pa.table({"image": pa.array([None], IMAGE)}), f / "train-1.parquet"),
        ],
        "train-1.parquet has no column 'label'",
    ),
    "null label": (lambda f: write_parquet(f / "train-0.parquet", [0, None, None]), "image 1 of .* has no label"),
}


@pytest.mark.parametrize("case", PARQUET)
def test_parquet_that_is_not_one_dataset_is_refused(tmp_path: Path, case: str) -> None:
    make, words = PARQUET[case]
    make(tmp_path)
    message = refusal(tmp_path)
    for part in words.split(".*"):
        assert part.strip() in message


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (None, "image 1 of "),
        ({"bytes": None, "path": None}, "image 1 of "),
        ({"bytes": None, "path": "pics/b.png"}, "image 1 (pics/b.png) of "),
        ({"bytes": b"", "path": "pics/b.png"}, "image 1 (pics/b.png) of "),
    ],
)
def test_images_without_bytes_are_named_by_row(tmp_path: Path, image: dict[str, Any] | None, words: str) -> None:
    rows = [{"bytes": picture(0), "path": None}, image]
    pq.write_table(pa.table({"image": pa.array(rows, IMAGE), "label": [0, 1]}), tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match="cannot be decoded") as error:
        load_source(str(tmp_path), "train", tmp_path).decode()
    assert str(error.value).startswith(words) and "\n" not in str(error.value)
    assert ("embed them" in str(error.value)) == (image is not None and image["bytes"] is None and bool(image["path"]))


def test_parquet_layouts_of_the_hub(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Shards with and without a hash in ``data/``, or a folder for each split; other splits are counted."""
    for i, split in enumerate(("train", "test", "validation")):
        write_parquet(tmp_path / "a" / "data" / f"{split}-00000-of-00001-b42732ff9a2ab5b2.parquet", [0], first=10 * i)
        write_parquet(tmp_path / "b" / "default" / split / "0000.parquet", [0], first=10 * i)
    for folder in (tmp_path / "a", tmp_path / "b"):
        caplog.clear()
        assert content(load_source(str(folder), "train", tmp_path)) == [(0, "0")]
        assert content(load_source(str(folder), "test", tmp_path)) == [(10, "0")]
        assert "1 Parquet files that are of neither split passed over" in caplog.text


def test_one_split_with_names_names_both(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1, 2], CATS)
    write_parquet(tmp_path / "test-0.parquet", [0, 1])
    assert load_source(str(tmp_path), "test", tmp_path).class_names == CATS


def test_a_table_of_datasets_with_paths_alone_gets_the_bytes(tmp_path: Path) -> None:
    """As the hub's repositories of pictures come."""
    import datasets

    place(tmp_path / "pictures", "a/0.png", "b/1.png")
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "pictures"), split="train", cache_dir=str(tmp_path / "cache")
    )
    table = loaded.with_format("arrow")[:]
    assert table["image"][0].as_py()["bytes"] is None
    assert [image["bytes"] for image in with_bytes(table)["image"].to_pylist()] == [picture(0), picture(1)]
    full = with_bytes(table)
    assert with_bytes(full).equals(full) and with_bytes(full.select(["label"])).column_names == ["label"]


# --- classes without an image ---


def test_classes_without_an_image_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 2, 2], CATS)
    source = load_source(str(tmp_path), "train", tmp_path)
    assert source.without_images == (1,) and source.num_classes == 3
    assert "has no image of 1 of its 3 classes: bee" in caplog.text
    caplog.clear()
    assert load_source(str(tmp_path), "train", tmp_path, only_digit=2).without_images == (1,) and not caplog.records


def test_classes_without_an_image_are_not_sampled_by_default(ae_file: Path, tmp_path: Path) -> None:
    path = write_small_checkpoint(tmp_path / "latest.pt", ae_file)
    saved = checkpoint.read(path)[0] | {"data": {"without_images": [0, 1, 9]}}
    checkpoint.write(path, saved)
    loaded = checkpoint.load_diffusion(path)
    assert loaded.labels == (2, 3, 4, 5, 6, 7, 8)
    assert Generator.of(loaded).in_turn(9) == [2, 3, 4, 5, 6, 7, 8, 2, 3] and Generator.of(loaded).in_turn(2, 9) == [
        9,
        9,
    ]
    flags = ["--ckpt", str(path), "--num-images", "3"]
    assert infer.main([*flags, "--output", str(tmp_path / "some.png")]) == 0
    wanted = Generator.of(loaded)([42, 43, 44], [2, 3, 4])
    first = np.asarray(Image.open(tmp_path / "some.png"))[2:30, 2:30]
    assert np.array_equal(first, wanted[0, 0].numpy())
    assert infer.main([*flags, "--digit", "9", "--output", str(tmp_path / "nine.png")]) == 0  # asked for, made


def test_a_damaged_record_of_classes_counts_for_nothing() -> None:
    damaged: tuple[Any, ...] = (None, 7, "0", {}, [0, 1, 2], ["a"], [None], [[]])
    for bad in damaged:
        assert labels_in({"data": {"without_images": bad}}, 3) == (0, 1, 2)
    assert labels_in({"data": 7}, 3) == labels_in({}, 3) == (0, 1, 2)
    assert labels_in({"data": {"without_images": [1, 99]}}, 3) == (0, 2)


def test_labels_of_a_dataset_leave_out_classes_without_images() -> None:
    """And a manifest's rule alone gives them again."""
    seeds = np.arange(5000)
    for text, rule in (("balanced", "0,2,5"), ("random", "random:0,2,5"), ("random:0,2,5", "random:0,2,5")):
        labels = Labels.parse(text, 6, 5000, usual=(0, 2, 5))
        drawn = labels.rows(0, seeds)
        assert labels.rule == rule and np.bincount(drawn)[[0, 2, 5]].min() > 1500 and set(drawn.tolist()) == {0, 2, 5}
        assert np.array_equal(Labels.parse(rule, 6, 0).rows(0, seeds), drawn)
    whole = Labels.parse("random", 6, 5000, usual=range(6))
    assert whole.rule == "random" and np.array_equal(whole.rows(0, seeds), Labels.parse("random", 6, 1).rows(0, seeds))
    assert Labels.parse("balanced", 6, 6, usual=range(6)).rule == "balanced"
    assert Labels.parse("balanced", 6, 6, only=3, usual=(0, 2)).cycle == (3,)
