"""A folder with a folder of PNGs for each class, as a table in the schema of the hub's image datasets.

``train/CLASS/*.png`` and ``test/CLASS/*.png``, or ``CLASS/*.png`` without splits: then a tenth is the test split, the
images whose ``CLASS/FILE`` has a SHA-256 that is divisible by ten, whatever other images there are. The classes are
those of both splits, in the order of their numbers where all names are numbers, else of their names.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa

from ldm_ray.classes import MAX_CLASSES, usable_names
from ldm_ray.errors import DataError

SPLITS = ("train", "test")
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def is_one(folder: Path) -> bool:
    """Whether there is a PNG in ``CLASS/``, ``train/CLASS/`` or ``test/CLASS/``."""
    return any(pngs(each) for base in bases(folder).values() for each in classes(base))


def read(folder: Path, split: str) -> tuple[pa.Table, tuple[str, ...]]:
    """(table of ``image: struct<bytes, path>``, ``label: int64``, class names). DataError: no image of the split."""
    found = bases(folder)
    kinds = {each.name for base in found.values() for each in classes(base) if pngs(each)}
    numbers = all(map(is_number, kinds))
    names = usable_names(sorted(kinds, key=lambda name: (int(name) if numbers else 0, name)))
    if names is None:
        raise DataError(f"--dataset {folder}: class folders have printable names, and are at most {MAX_CLASSES}")
    rows, labels = [], []
    for label, name in enumerate(names):
        for file in pngs(found[split] / name) if split in found else []:
            path = f"{name}/{file.name}"
            if found[split] != folder or in_split(path, split):
                rows.append({"bytes": file.read_bytes(), "path": path})
                labels.append(label)
    if not rows:
        raise DataError(f"--dataset {folder} has no image for the split {split!r} ({split}/CLASS/*.png)")
    return pa.table({"image": pa.array(rows, IMAGE), "label": pa.array(labels, pa.int64())}), names


def bases(folder: Path) -> dict[str, Path]:
    """Where the class folders of each split are: the folder itself for both where it has no folder of a split."""
    found = {split: folder / split for split in SPLITS if any(map(pngs, classes(folder / split)))}
    return found or dict.fromkeys(SPLITS, folder)


def classes(base: Path) -> list[Path]:
    there = base.iterdir() if base.is_dir() else []
    return sorted(each for each in there if each.is_dir() and not each.name.startswith("."))


def pngs(folder: Path) -> list[Path]:
    """The PNG files of a folder in the order of their names."""
    there = folder.iterdir() if folder.is_dir() else []
    return sorted(file for file in there if file.suffix.lower() == ".png" and not file.name.startswith("."))


def in_split(path: str, split: str) -> bool:
    """Of a dataset without splits: whether the image ``CLASS/FILE`` is in this one."""
    return (int(hashlib.sha256(path.encode()).hexdigest(), 16) % 10 == 0) == (split == "test")


def is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()
