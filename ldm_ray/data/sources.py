"""From ``--dataset`` to a table of images: a hub id, a folder of Parquet files, or the embedded digits."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import torch

from ldm_ray.data.digits import digits_table
from ldm_ray.data.images import decode_png
from ldm_ray.errors import DataError

HUB_MNIST = "ylecun/mnist"
HUB_TIMEOUT_S = 4.0
NUM_CLASSES = 10
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Images of one split, still encoded.

    table: ``image: struct<bytes, path>``, ``label: int64``, ``index: int64`` (position in the whole split).
    name: what was asked for, as resolved; revision: a hash of the content or the hub's commit.
    """

    table: pa.Table
    name: str
    revision: str
    split: str
    only_digit: int | None
    image_size: tuple[int, int]
    num_classes: int = NUM_CLASSES

    def __len__(self) -> int:
        return self.table.num_rows

    def decode(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All images (N, 1, H, W) uint8 and their labels (N,) int64, in this process. DataError names a bad image."""
        images = np.empty((len(self), 1, *self.image_size), dtype=np.uint8)
        column, index = pc.struct_field(self.table["image"], "bytes"), self.table["index"]
        for row, data in enumerate(column):
            where = f"image {index[row]} of {self.name} ({self.split})"
            images[row, 0] = decode_png(data.as_py(), self.image_size, where)
        return torch.from_numpy(images), torch.from_numpy(self.table["label"].to_numpy().copy())


def load_source(dataset: str, split: str, cache_dir: Path, only_digit: int | None = None) -> ImageSource:
    """Opens a split of ``--dataset``.

    Raises DataError: unreachable hub, empty folder, missing columns, labels out of range, no image of the
    digit, a first image of another mode.
    """
    name, (table, revision) = resolve(dataset, split, cache_dir)
    table = checked(table, f"{name} ({split})")
    table = table.append_column("index", pa.array(np.arange(table.num_rows, dtype=np.int64)))
    if only_digit is not None:
        table = table.filter(pc.equal(table["label"], only_digit))
        if table.num_rows == 0:
            raise DataError(f"--only-digit {only_digit}: {name} ({split}) has no such image")
    first = decode_png(table["image"][0].as_py()["bytes"], where=f"image {table['index'][0]} of {name} ({split})")
    return ImageSource(
        table=table.combine_chunks(),
        name=name,
        revision=revision,
        split=split,
        only_digit=only_digit,
        image_size=(first.shape[0], first.shape[1]),
    )


def resolve(dataset: str, split: str, cache_dir: Path) -> tuple[str, tuple[pa.Table, str]]:
    """(resolved name, (table, revision))."""
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
    folder = Path(dataset).expanduser()
    if folder.exists():
        return str(folder.absolute()), from_folder(folder, split)
    if dataset.count("/") == 1 and not dataset.startswith((".", "/", "~")):
        return dataset, from_hub(dataset, split, cache_dir)
    raise DataError(
        f"--dataset {dataset} is no folder here; allowed are a folder of Parquet files, "
        f"a hub id such as {HUB_MNIST}, 'digits' or 'auto'"
    )


def embedded(split: str) -> tuple[pa.Table, str]:
    table = digits_table(split)
    return table, content_hash(table)


def from_folder(folder: Path, split: str) -> tuple[pa.Table, str]:
    """Reads ``<split>-*.parquet`` (or ``<split>/*.parquet``), in the order of the names."""
    if folder.is_file():
        raise DataError(f"--dataset {folder} is a file; needed is a folder with {split}-*.parquet in it")
    files = sorted({*folder.rglob(f"{split}-*.parquet"), *folder.rglob(f"{split}/*.parquet")})
    if not files:
        raise DataError(f"--dataset {folder} has no Parquet file for the split {split!r} ({split}-*.parquet)")
    try:
        table = pyarrow.dataset.dataset([str(file) for file in files]).to_table()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"--dataset {folder} cannot be read as Parquet: {error}") from None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return table, digest.hexdigest()


def from_hub(name: str, split: str, cache_dir: Path) -> tuple[pa.Table, str]:
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
    table = loaded.with_format("arrow")[:]
    return table, revision or content_hash(table)


def checked(table: pa.Table, where: str) -> pa.Table:
    """The columns ``image`` and ``label`` in their types, or DataError."""
    if table.num_rows == 0:
        raise DataError(f"{where} has no images")
    for column in ("image", "label"):
        if column not in table.column_names:
            raise DataError(
                f"{where} has no column {column!r}; needed are image (struct<bytes, path>) and label (int64), "
                f"found are {', '.join(table.column_names)}"
            )
    kind = table.schema.field("image").type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise DataError(f"{where}: column 'image' is {kind}; needed is struct<bytes: binary, path: string>")
    if not pa.types.is_integer(table.schema.field("label").type) or table["label"].null_count:
        raise DataError(f"{where}: column 'label' is {table.schema.field('label').type}; needed are whole numbers")
    low, high = (bound.as_py() for bound in pc.min_max(table["label"]).values())
    if low < 0 or high >= NUM_CLASSES:
        raise DataError(f"{where} has labels from {low} to {high}; allowed are 0 to {NUM_CLASSES - 1}")
    return pa.table({"image": table["image"], "label": table["label"].cast(pa.int64())})


def content_hash(table: pa.Table) -> str:
    """SHA-256 over the image bytes and labels, in order."""
    digest = hashlib.sha256()
    for data in pc.struct_field(table["image"], "bytes"):
        digest.update(data.as_buffer() or b"")
    digest.update(np.ascontiguousarray(table["label"].to_numpy()).tobytes())
    return digest.hexdigest()
