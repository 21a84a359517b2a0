"""Images, the embedded digits, and image folders with every mistake that users make."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from ldm_ray.data import examples, images
from ldm_ray.data.digits import digits_table
from ldm_ray.data.sources import load_source
from ldm_ray.data.statistics import LatentStatistics
from ldm_ray.files.records import fingerprint
from ldm_ray.settings.errors import DataError
from tests.helpers.data import Shared

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def one_line(error: pytest.ExceptionInfo[DataError]) -> None:
    assert "\n" not in str(error.value)


# --- images ---


def test_uint8_survives_float() -> None:
    every = torch.arange(256).byte()
    assert torch.equal(images.to_uint8(images.to_float(every)), every)
    assert images.to_float(every)[[0, -1]].tolist() == [0.0, 1.0]


def test_float_is_rounded_to_nearest_and_clipped() -> None:
    values = torch.tensor([-3.0, -1e-6, 0.49 / 255, 0.51 / 255, 100.4 / 255, 100.6 / 255, 1.0, 1.5])
    assert images.to_uint8(values).tolist() == [0, 0, 0, 1, 100, 101, 255, 255]


@pytest.mark.parametrize("shape", [(28, 28), (1, 1), (5, 9), (64, 63), (64, 64), (448, 448), (28, 28, 3), (90, 90, 3)])
def test_pngs_of_every_size_open_elsewhere(shape: tuple[int, ...]) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
    text = {"a": "plain", "label": "siebzehn ü", "b": "ᾱ → 1"}
    for data, picture in zip(images.encode_pngs(pictures, text), pictures, strict=True):
        assert data == images.encode_png(picture, text)
        with Image.open(io.BytesIO(data)) as unread:
            unread.verify()
        opened: Any = Image.open(io.BytesIO(data))
        assert np.array_equal(np.asarray(opened), picture) and opened.text == text


def test_a_small_png_is_these_bytes() -> None:
    """Whatever the version of zlib; they were checked by Pillow."""
    data = images.encode_png(np.arange(6, dtype=np.uint8).reshape(2, 3))
    assert data.hex() == (
        "89504e470d0a1a0a0000000d4948445200000003000000020800000000b81f39"
        "c600000013494441547801010800f7ff0000010200030405002e00105dd9c116"
        "0000000049454e44ae426082"
    )


def test_png_is_lossless_and_keeps_its_text() -> None:
    picture = noise(28, 28)
    data = images.encode_png(picture, {"seed": "42"})
    assert np.array_equal(images.decode_png(data, (28, 28)), picture)
    assert Image.open(io.BytesIO(data)).text == {"seed": "42"}  # type: ignore[attr-defined]
    assert images.encode_png(picture, {"seed": "42"}) == data


@pytest.mark.parametrize("count", [1, 2, 4, 7, 16, 64])
@pytest.mark.parametrize("columns", [None, 1, 3, 8])
def test_grid_is_laid_out_as_make_grid(count: int, columns: int | None) -> None:
    pictures = torch.from_numpy(noise(count, 1, 28, 28))
    made = images.grid(pictures, columns)
    across = min(count, columns or round(count**0.5))
    assert made.dtype == np.uint8 and np.array_equal(made, make_grid(pictures, nrow=across, padding=2)[0])


def test_grids_and_gifs_are_written_whole(tmp_path: Path) -> None:
    pictures = torch.from_numpy(noise(4, 1, 28, 28))
    images.save_grid(pictures, tmp_path / "a" / "grid.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a" / "grid.png")), images.grid(pictures))
    images.save_gif([picture[0].numpy() for picture in pictures], tmp_path / "a" / "film.gif", 80, 1500)
    with Image.open(tmp_path / "a" / "film.gif") as film:
        assert film.n_frames == 4 and film.info["loop"] == 0  # type: ignore[attr-defined]
        film.seek(3)
        assert film.info["duration"] == 1500
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["film.gif", "grid.png"]


L, SIXTEEN = Image.fromarray(noise(28, 28)), Image.fromarray(noise(28, 28).astype(np.uint16))
BAD_IMAGES: dict[str, tuple[bytes | None, str]] = {
    "other size": (png(L.resize((32, 20))), "is 20x32 pixels; needed is 28x28"),
    "RGB": (png(L.convert("RGB")), "mode RGB; needed is 8-bit grayscale"),
    "16 bit": (png(SIXTEEN), "mode I;16"),
    "1 bit": (png(L.convert("1")), "mode 1;"),
    "alpha": (png(L.convert("LA")), "mode LA"),
    "null": (None, "it is empty"),
    "empty": (b"", "it is empty"),
    "text": (b"hello\nworld", "cannot be decoded"),
    "truncated": (png(L)[:300], "cannot be decoded"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused_by_name(case: str) -> None:
    data, words = BAD_IMAGES[case]
    with pytest.raises(DataError, match=words) as error:
        images.decode_png(data, (28, 28), "image 17 of x (train)")
    one_line(error)
    assert str(error.value).startswith("image 17 of x (train)")


# --- embedded digits ---


def test_digits_are_the_same_everywhere_and_of_their_sizes() -> None:
    train, test = digits_table("train"), digits_table("test")
    assert (train.num_rows, test.num_rows) == (30_000, 297)
    for table in (train, test):
        assert table.schema.field("image").type == IMAGE and table.schema.field("label").type == pa.int64()
        assert set(table["label"].to_pylist()) == set(range(10))
        assert images.decode_png(table["image"][-1].as_py()["bytes"], (28, 28)).max() > 128
    assert digits_table("test").equals(test)
    assert train["label"][:1500].equals(train["label"][1500:3000])  # each scan again, turned a little
    first, again = (images.decode_png(train["image"][i].as_py()["bytes"]).astype(float) for i in (0, 1500))
    assert 0 < np.abs(first - again).mean() < 40


def test_digits_as_a_dataset(tmp_path: Path) -> None:
    source = load_source("digits", "test", tmp_path)
    assert (source.name, len(source), source.image_size) == ("digits", 297, (28, 28))
    assert source.revision == load_source("digits", "test", tmp_path, only_digit=7).revision
    assert not list(tmp_path.iterdir())


# --- folders ---


def test_a_folder_in_the_hubs_schema(digits_folder: Path, tmp_path: Path) -> None:
    train, test = (load_source(str(digits_folder), split, tmp_path) for split in ("train", "test"))
    assert (len(train), len(test), train.image_size, train.num_classes) == (240, 57, (28, 28), 10)
    assert train.table.column_names == ["image", "label", "index"]
    assert train.table["index"].to_pylist() == list(range(240)) and train.revision != test.revision
    assert test.table["label"].to_pylist() == digits_table("test")["label"][240:].to_pylist()


def test_only_one_digit_keeps_the_positions(digits_folder: Path, tmp_path: Path) -> None:
    whole = load_source(str(digits_folder), "train", tmp_path)
    sevens = load_source(str(digits_folder), "train", tmp_path, only_digit=7)
    where = np.flatnonzero(whole.table["label"].to_numpy() == 7)
    assert sevens.table["index"].to_pylist() == where.tolist() and set(sevens.table["label"].to_pylist()) == {7}
    assert sevens.revision == whole.revision


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    table = digits_table("test")
    for number in (2, 0, 1):
        pq.write_table(table.slice(number * 50, 50), tmp_path / f"train-{number:05d}-of-00003.parquet")
    source = load_source(str(tmp_path), "train", tmp_path)
    assert source.table["label"].to_pylist() == table["label"][:150].to_pylist()


def test_real_mnist(shared: Shared, tmp_path: Path) -> None:
    source = load_source(str(shared.mnist), "test", tmp_path)
    assert len(source) == 10_000 and source.image_size == (28, 28)
    assert source.table["label"][:5].to_pylist() == [7, 2, 1, 0, 4]


def write(folder: Path, **columns: Any) -> None:
    pq.write_table(pa.table(columns), folder / "train-00000-of-00001.parquet")


def write_two_schemas(folder: Path) -> None:
    write(folder, image=column(png(L)), label=[1])
    pq.write_table(pa.table({"image": ["x"], "label": ["y"]}), folder / "train-1.parquet")


def column(*pictures: bytes | None) -> pa.Array:
    return pa.array([{"bytes": data, "path": None} for data in pictures], type=IMAGE)


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda folder: None, "has no Parquet file for the split 'train'"),
    "only test": (lambda folder: pq.write_table(pa.table({"a": [1]}), folder / "test-0.parquet"), "no Parquet file"),
    "no Parquet": (lambda folder: (folder / "train-0.parquet").write_text("a\nb"), "cannot be read as Parquet"),
    "empty file": (lambda folder: (folder / "train-0.parquet").touch(), "cannot be read as Parquet"),
    "no rows": (lambda folder: write(folder, image=column(), label=pa.array([], pa.int64())), "has no images"),
    "no label": (lambda folder: write(folder, image=column(png(L))), "no column 'label'.*found are image"),
    "no image": (lambda folder: write(folder, label=[1]), "no column 'image'"),
    "plain bytes": (lambda folder: write(folder, image=[png(L)], label=[1]), "column 'image' is binary"),
    "text labels": (lambda folder: write(folder, image=column(png(L)), label=["one"]), "whole numbers"),
    "no label value": (lambda folder: write(folder, image=column(png(L), png(L)), label=[1, None]), "whole numbers"),
    "label 4096": (
        lambda folder: write(folder, image=column(png(L), png(L)), label=[0, 4096]),
        "allowed are 0 to 4095",
    ),
    "label -1": (lambda folder: write(folder, image=column(png(L)), label=[-1]), "labels from -1 to -1"),
    "RGB": (lambda folder: write(folder, image=column(png(L.convert("RGB"))), label=[1]), "image 0 .*mode RGB"),
    "no bytes": (lambda folder: write(folder, image=column(None), label=[1]), "image 0 .*it is empty"),
    "two schemas": (lambda folder: write_two_schemas(folder), "cannot be read as Parquet"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_unusable_folders_are_refused(tmp_path: Path, case: str) -> None:
    make, words = FOLDERS[case]
    make(tmp_path)
    with pytest.raises(DataError, match=words) as error:
        load_source(str(tmp_path), "train", tmp_path)
    one_line(error)
    assert str(tmp_path) in str(error.value)


def test_what_is_no_folder_is_refused(tmp_path: Path, digits_folder: Path) -> None:
    file = digits_folder / "train-00000-of-00001.parquet"
    for given, words in (
        (str(tmp_path / "nowhere"), "no folder here; allowed are"),
        ("nowhere", "no folder here; allowed are"),
        (str(file), "is a file; needed is a folder"),
    ):
        with pytest.raises(DataError, match=words) as error:
            load_source(given, "train", tmp_path)
        one_line(error)
        assert given in str(error.value)


def test_a_digit_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, image=column(png(L)), label=[3])
    with pytest.raises(DataError, match=r"--only-digit 4: .* has no such image"):
        load_source(str(tmp_path), "train", tmp_path, only_digit=4)


# --- examples ---


def latents(count: int = 100) -> tuple[np.ndarray, pa.Table]:
    vectors = np.random.default_rng(1).normal(2, 3, (count, 4)).astype(np.float32)
    labels, index = np.arange(count, dtype=np.int64) % 10, np.arange(count, dtype=np.int64) * 3
    return vectors, pa.table({"latent": examples.fixed_size(vectors), "label": labels, "index": index})


def test_examples_survive_and_plain_parquet_reads_them(tmp_path: Path) -> None:
    vectors, table = latents()
    examples.write_examples(tmp_path / "x", table, "latent", {"split": "train"})
    back = examples.read_examples(tmp_path / "x")
    assert np.array_equal(back.vectors, vectors) and back.index.tolist() == list(range(0, 300, 3))
    assert back.manifest["fingerprint"] == fingerprint({"split": "train"})
    torch.testing.assert_close(back.statistics.covariance, LatentStatistics.of(torch.from_numpy(vectors)).covariance)
    plain = pq.read_table(tmp_path / "x" / "part-00000.parquet")
    assert plain.schema.field("latent").type == pa.list_(pa.float32(), 4) and b"ldm_ray" in plain.schema.metadata


def test_unfinished_examples_are_never_read(tmp_path: Path) -> None:
    examples.write_examples(tmp_path, latents()[1], "latent", {})
    (tmp_path / examples.MANIFEST).rename(tmp_path / "kept")
    assert not examples.is_complete(tmp_path)
    with pytest.raises(DataError, match="did not finish"):
        examples.read_examples(tmp_path)
    (tmp_path / "kept").rename(tmp_path / examples.MANIFEST)
    pq.write_table(latents(99)[1], tmp_path / "part-00000.parquet")
    with pytest.raises(DataError, match="does not hold the 100 rows"):
        examples.read_examples(tmp_path)


def test_examples_that_others_may_be_reading_are_never_taken_away(tmp_path: Path) -> None:
    """Several first runs over the same images write the same folder."""
    folder, table = tmp_path / "latents" / "x", latents()[1]
    together = Barrier(6)

    def write_and_read(_: int) -> int:
        together.wait()
        examples.write_examples(folder, table, "latent", {})
        return sum(len(examples.read_examples(folder)) for _ in range(5))

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(write_and_read, range(6))) == [500] * 6
    before = {file: file.stat().st_ino for file in folder.iterdir()}
    examples.write_examples(folder, table, "latent", {})
    assert {file: file.stat().st_ino for file in folder.iterdir()} == before
    assert [entry.name for entry in (tmp_path / "latents").iterdir()] == ["x"]


def test_examples_appear_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, (vectors, table) = tmp_path / "latents" / "x", latents()
    original = examples.write_bytes

    def full_disk(path: Path, data: bytes) -> None:
        assert not folder.exists()
        if path.name == examples.MANIFEST:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(examples, "write_bytes", full_disk)
        with pytest.raises(OSError, match="No space left"):
            examples.write_examples(folder, table, "latent", {})
    assert list((tmp_path / "latents").iterdir()) == []
    folder.mkdir()
    pq.write_table(latents(7)[1], folder / "part-00000.parquet")  # left by a run of an earlier version
    examples.write_examples(folder, table, "latent", {})
    assert np.array_equal(examples.read_examples(folder).vectors, vectors)


@pytest.mark.parametrize(("count", "fraction", "held"), [(100, 0.05, 5), (2, 0.01, 1), (10, 0.99, 9), (3, 0.5, 2)])
def test_the_split_is_a_partition_and_always_the_same(tmp_path: Path, count: int, fraction: float, held: int) -> None:
    examples.write_examples(tmp_path, latents(count)[1], "latent", {})
    found = examples.read_examples(tmp_path)
    train, val = examples.split(found, fraction)
    assert len(val) == held and sorted([*train.tolist(), *val.tolist()]) == list(range(count))
    assert [part.tolist() for part in examples.split(found, fraction)] == [train.tolist(), val.tolist()]
    assert train.tolist() == sorted(train.tolist()) and val.tolist() == sorted(val.tolist())
    assert found.take(val).index.tolist() == (val * 3).tolist()
