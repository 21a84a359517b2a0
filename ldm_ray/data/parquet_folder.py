"""A folder of Parquet files in the schema of the hub's image datasets: ``train-*.parquet`` or ``train/*.parquet``.

The files of both splits are those of one dataset: in one folder, every shard once, the classes in one order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from ldm_ray.data.classes import listing, usable_names
from ldm_ray.data.metadata import METADATA
from ldm_ray.data.walk import files_below
from ldm_ray.settings.errors import DataError

SPLITS = ("train", "test")
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(-[0-9a-f]+)?")  # the hub's earlier names end in a hash
COPY = re.compile(r"( \(\d+\)|[ _-]+copy( \(?\d+\)?)?)$", re.IGNORECASE)


def files_of(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files of each split in the order of their names; splits without any are left out."""
    every = [file for file in files_below(folder) if file.suffix == ".parquet" and file.name not in METADATA]
    splits = {split: sorted(file for file in every if base_of(file, split, folder)) for split in SPLITS}
    return {split: files for split, files in splits.items() if files}


def base_of(file: Path, split: str, folder: Path) -> Path | None:
    """The folder of the dataset that the file is of, None where it is not of the split."""
    if file.name.startswith(f"{split}-"):
        return file.parent
    return file.parent.parent if file.parent.name == split and file.parent != folder else None


def read(folder: Path, splits: dict[str, list[Path]], split: str) -> tuple[pa.Table, str, tuple[str, ...] | None]:
    """(table, SHA-256 of the files, class names where the metadata has usable ones). DataError: not one dataset."""
    bases = {base_of(file, each, folder) for each, files in splits.items() for file in files}
    if len(bases) > 1:
        names = ", ".join(sorted(str(base.relative_to(folder)) for base in bases if base))
        raise DataError(f"--dataset {folder} has Parquet of several datasets or configurations ({names}): name one")
    files = splits[split]
    digest, seen = hashlib.sha256(), dict[str, Path]()
    for file in files:
        own = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
                own.update(chunk)
        twin = seen.setdefault(own.hexdigest(), file)
        if twin is not file:
            raise DataError(f"--dataset {folder}: {file.name} has the same bytes as {twin.name}: remove one of them")
    try:
        for file in files:
            check_columns(pq.read_schema(file), f"{folder}: {file.name}")
        table = pyarrow.dataset.dataset([str(file) for file in files]).to_table()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"--dataset {folder} cannot be read as Parquet: {error}") from None
    for each in splits.values():
        check_shards(folder, [file.name for file in each])
    return table, digest.hexdigest(), one_order(folder, [file for each in splits.values() for file in each])


def check_shards(folder: Path, names: Sequence[str]) -> None:
    """DataError: a second copy of a file, a shard that is missing or that does not belong to the others."""
    stems = {name.removesuffix(".parquet") for name in names}
    for stem in sorted(stems):
        original = COPY.sub("", stem)
        if original != stem and original in stems:
            raise DataError(
                f"--dataset {folder}: {stem}.parquet is a second copy of {original}.parquet: remove one of them"
            )
    shards = {stem: match for stem in stems if (match := SHARD.fullmatch(stem))}
    if not shards:
        return
    others = sorted(stems - shards.keys())
    if others:
        raise DataError(
            f"--dataset {folder}: {others[0]}.parquet is none of the shards beside it ({min(shards)}.parquet): "
            "remove what does not belong to the dataset"
        )
    totals = {(match[1], int(match[3])) for match in shards.values()}
    if len(totals) > 1:
        first, second = sorted(f"{name}-…-of-{total:05d}" for name, total in totals)[:2]
        raise DataError(f"--dataset {folder} has shards of two datasets, {first} and {second}: remove one of them")
    (name, total), numbers = next(iter(totals)), sorted(int(match[2]) for match in shards.values())
    if numbers not in (list(range(total)), list(range(1, total + 1))):
        twice = len(set(numbers)) < len(numbers)
        what = "has a shard twice" if twice else f"has {len(numbers)} of {total} shards"
        raise DataError(f"--dataset {folder} {what} ({name}-…-of-{total:05d}): fetch it again")


def check_columns(schema: pa.Schema, where: str) -> None:
    """DataError where ``image`` or ``label`` is missing."""
    for column in ("image", "label"):
        if column not in schema.names:
            raise DataError(
                f"{where} has no column {column!r}; needed are image (struct<bytes, path>) and label (int64), "
                f"found are {', '.join(schema.names)}"
            )


def one_order(folder: Path, files: Sequence[Path]) -> tuple[str, ...] | None:
    """The class names of the files that have any. DataError where two of them differ: a label is a position."""
    first: tuple[Path, tuple[str, ...]] | None = None
    for file in files:
        names = None
        with contextlib.suppress(pa.ArrowException, OSError):  # a split that cannot be read says so when it is
            names = names_of(pq.read_schema(file))
        if names is not None and first is not None and names != first[1]:
            raise DataError(
                f"--dataset {folder}: {first[0].name} has the classes {listing(first[1])}, "
                f"{file.name} {listing(names)}: a label is a position in them, so write both with the same ClassLabel"
            )
        first = first or (names and (file, names)) or None
    return first[1] if first else None


def names_of(schema: pa.Schema) -> tuple[str, ...] | None:
    """The names of the ``ClassLabel`` that the schema's metadata ``huggingface`` describes."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        return usable_names(info["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
