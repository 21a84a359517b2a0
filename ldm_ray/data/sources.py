"""From ``--dataset`` to a table of images: a hub id, a folder of Parquet files or of PNGs, or the embedded digits."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ldm_ray.data import image_folder, parquet_folder
from ldm_ray.data.classes import listing, numbered, usable_names
from ldm_ray.data.digits import digits_table
from ldm_ray.data.images import decode_png
from ldm_ray.data.walk import files_below
from ldm_ray.files.paths import local_path
from ldm_ray.settings.errors import DataError
from ldm_ray.settings.limits import MAX_CLASSES

HUB_MNIST = "ylecun/mnist"
HUB_TIMEOUT_S = 4.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Images of one split, still encoded.

    table: ``image: struct<bytes, path>``, ``label: int64``, ``index: int64`` (position in the whole split).
    name: what was asked for, as resolved; revision: a hash of the content or the hub's commit.
    class_names: from the dataset's metadata or its folders; without them the numbers up to the highest label.
    without_images: the classes of which the whole split has none.
    """

    table: pa.Table
    name: str
    revision: str
    split: str
    only_digit: int | None
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    without_images: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def decode(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All images (N, 1, H, W) uint8 and their labels (N,) int64, in this process. DataError names a bad image."""
        images = np.empty((len(self), 1, *self.image_size), dtype=np.uint8)
        for row, (image, index) in enumerate(zip(self.table["image"], self.table["index"], strict=True)):
            where = f"{place(image.as_py(), index.as_py())} of {self.name} ({self.split})"
            images[row, 0] = decode_png(image.as_py()["bytes"], self.image_size, where)
        return torch.from_numpy(images), torch.from_numpy(self.table["label"].to_numpy().copy())


def load_source(dataset: str, split: str, cache_dir: Path, only_digit: int | None = None) -> ImageSource:
    """Opens a split of ``--dataset``.

    Raises DataError: unreachable hub, empty folder, missing columns, labels out of range, no image of the
    digit, a first image of another mode.
    """
    name, images = resolve(dataset, split, cache_dir)
    table = checked(images.table, f"{name} ({split})", images.class_names)
    names = images.class_names or numbered(pc.max(table["label"]).as_py() + 1)
    present = set(table["label"].unique().to_pylist())
    absent = tuple(label for label in range(len(names)) if label not in present)
    if absent and only_digit is None:
        log.warning(
            "WARNING: %s (%s) has no image of %d of its %d classes: %s.",
            name, split, len(absent), len(names), listing([names[label] for label in absent]),
        )  # fmt: skip
    table = table.append_column("index", pa.array(np.arange(table.num_rows, dtype=np.int64)))
    if only_digit is not None:
        table = table.filter(pc.equal(table["label"], only_digit))
        if table.num_rows == 0:
            raise DataError(f"--only-digit {only_digit}: {name} ({split}) has no such image")
    image = table["image"][0].as_py()
    first = decode_png(image["bytes"], where=f"{place(image, table['index'][0].as_py())} of {name} ({split})")
    return ImageSource(
        table=table.combine_chunks(),
        name=name,
        revision=images.revision,
        split=split,
        only_digit=only_digit,
        image_size=(first.shape[0], first.shape[1]),
        class_names=names,
        without_images=absent,
    )


def place(image: dict[str, Any], index: int) -> str:
    """Which image it is, for a message."""
    return f"image {index}" + (f" ({image['path']})" if image.get("path") else "")


@dataclass(frozen=True)
class Split:
    """A split as it was found: columns not yet checked; class_names None where the metadata has no usable ones."""

    table: pa.Table
    revision: str
    class_names: tuple[str, ...] | None


def resolve(dataset: str, split: str, cache_dir: Path) -> tuple[str, Split]:
    """(resolved name, split)."""
    if dataset == "digits":
        return "digits", embedded(split)
    if dataset == "auto":
        try:
            return HUB_MNIST, from_hub(HUB_MNIST, split, cache_dir)
        except DataError as error:
            log.warning("WARNING: %s.", error)
            log.warning(
                "WARNING: going on with the EMBEDDED DIGITS (scikit-learn), not MNIST; "
                "for MNIST, name a folder of Parquet files with --dataset or connect to the hub."
            )
            return "digits", embedded(split)
    folder = local_path(dataset)
    if folder.exists():
        return str(folder.absolute()), from_folder(folder, split)
    if dataset.count("/") == 1 and not dataset.startswith((".", "/", "~")):
        return dataset, from_hub(dataset, split, cache_dir)
    raise DataError(
        f"--dataset {dataset} is no folder here; allowed are a folder of Parquet files or of a folder for each class, "
        f"a hub id such as {HUB_MNIST}, 'digits' or 'auto'"
    )


def embedded(split: str) -> Split:
    table = digits_table(split)
    return Split(table, content_hash(table), numbered(10))


def from_folder(folder: Path, split: str) -> Split:
    """Reads what ``parquet_folder`` knows, and where there is no Parquet of either split what ``image_folder`` does."""
    if folder.is_file():
        raise DataError(f"--dataset {folder} is a file; needed is a folder with {split}-*.parquet in it")
    files = parquet_folder.files_of(folder)
    if not files and image_folder.is_one(folder):
        table, names = image_folder.read(folder, split)
        return Split(table, content_hash(table), names)
    if split not in files:
        raise DataError(
            f"--dataset {folder} has no Parquet file for the split {split!r} ({split}-*.parquet), "
            f"and no PNG in a folder for each class ({split}/CLASS/*.png)"
        )
    read = {file for each in files.values() for file in each}
    over = [file for file in files_below(folder) if file.suffix == ".parquet" and file not in read]
    if over:
        what = f"{len(over)} Parquet files that are of neither split passed over, such as {over[0].relative_to(folder)}"
        log.warning("WARNING: %s (%s): %s.", folder, split, what)
    return Split(*parquet_folder.read(folder, files, split))


def from_hub(name: str, split: str, cache_dir: Path) -> Split:
    """Loads through ``datasets``; where the hub does not answer within seconds, from its cache alone."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    revision = None
    try:
        info = huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
        revision = info.sha
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise DataError(f"--dataset {name}: the hub has no such dataset, or it is private") from None
    except Exception as error:  # each release of the client raises its own kinds for an unreachable hub
        log.debug("hub: %r", error)
    offline = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    datasets.disable_progress_bars()
    try:
        if revision is None:  # otherwise the client's own retries take half a minute
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        loaded = datasets.load_dataset(name, split=split, revision=revision, cache_dir=str(cache_dir))
    except Exception as error:  # likewise
        if revision is None:
            raise DataError(
                f"--dataset {name}: the hub cannot be reached and nothing of it is cached in {cache_dir}"
            ) from None
        raise DataError(f"--dataset {name}, split {split!r}, cannot be loaded: {error}") from None
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = offline
    table = with_bytes(loaded.with_format("arrow")[:])
    names = usable_names(getattr(loaded.features.get("label"), "names", None))
    return Split(table, revision or content_hash(table), names)


def with_bytes(table: pa.Table) -> pa.Table:
    """A table of the ``datasets`` library with the files' bytes where it has paths into its cache alone, as it does of
    repositories of pictures."""
    from datasets.table import embed_table_storage

    kind = table.schema.field("image").type if "image" in table.column_names else pa.null()
    if not pa.types.is_struct(kind) or {field.name for field in kind} != {"bytes", "path"}:
        return table
    return embed_table_storage(table) if pc.struct_field(table["image"], "bytes").null_count else table


def checked(table: pa.Table, where: str, class_names: Sequence[str] | None) -> pa.Table:
    """The columns ``image`` and ``label`` in their types, every label with a name where there are names."""
    if table.num_rows == 0:
        raise DataError(f"{where} has no images")
    parquet_folder.check_columns(table.schema, where)
    kind = table.schema.field("image").type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise DataError(f"{where}: column 'image' is {kind}; needed is struct<bytes: binary, path: string>")
    if not pa.types.is_integer(table.schema.field("label").type):
        raise DataError(f"{where}: column 'label' is {table.schema.field('label').type}; needed are whole numbers")
    check_no_nulls(table, where)
    low, high = (bound.as_py() for bound in pc.min_max(table["label"]).values())
    most = len(class_names) if class_names else MAX_CLASSES
    if low < 0 or high >= most:
        named = f", since its metadata names {most} classes" if class_names else ""
        raise DataError(f"{where} has labels from {low} to {high}; allowed are 0 to {most - 1}{named}")
    return pa.table({"image": table["image"], "label": table["label"].cast(pa.int64())})


def check_no_nulls(table: pa.Table, where: str) -> None:
    """DataError with the first row that has no label or no bytes of an image."""
    row = pc.index(pc.is_null(table["label"]), True).as_py()
    if row >= 0:
        image = table["image"][row].as_py() or {}
        raise DataError(f"{place(image, row)} of {where} has no label; needed are whole numbers")
    row = pc.index(pc.is_null(pc.struct_field(table["image"], "bytes")), True).as_py()
    if row >= 0:
        image = table["image"][row].as_py() or {}
        reason = "its path is there and its bytes are not: embed them" if image.get("path") else "it is empty (null)"
        raise DataError(f"{place(image, row)} of {where} cannot be decoded: {reason}")


def content_hash(table: pa.Table) -> str:
    """SHA-256 over the image bytes and labels, in order."""
    digest = hashlib.sha256()
    for data in pc.struct_field(table["image"], "bytes"):
        digest.update(data.as_buffer() or b"")
    digest.update(np.ascontiguousarray(table["label"].to_numpy()).tobytes())
    return digest.hexdigest()
