"""The list of a picture folder, as the hub's ``imagefolder`` has it: file_name and label of each picture."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ldm_ray.settings.errors import DataError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
COLUMNS = ("file_name", "label")
WHOLE = re.compile(r"[+-]?[0-9]{1,9}(\.0*)?")


@dataclass(frozen=True)
class Picture:
    """file: where it is. path: its name in the dataset. label: a class's number, or its name."""

    file: Path
    path: str
    label: int | str


def metadata_in(folder: Path) -> Path | None:
    """The folder's list, if it has one. DataError: several."""
    files = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(files) > 1:
        raise DataError(f"{folder} has {' and '.join(file.name for file in files)}: keep the one that counts")
    return files[0] if files else None


def listed(file: Path, prefix: str = "") -> list[Picture]:
    """The pictures of a list in its order; prefix: what their paths in the dataset begin with.

    Raises DataError, with the row (counted from 0, without a header): a column or a label that is missing, a file
    that is missing, listed twice or outside of the folder.
    """
    pictures: list[Picture] = []
    seen: set[str] = set()
    splits: set[Any] = set()
    for number, row in enumerate(rows_of(file)):
        where = f"row {number} of {file}"
        missing = [column for column in COLUMNS if column not in row]
        if missing:
            raise DataError(
                f"{where} has no column {missing[0]!r}; needed are file_name and label, found are {', '.join(row)}"
            )
        name, label = row["file_name"], label_of(row["label"])
        if not isinstance(name, str) or not name:
            raise DataError(f"{where} has no file_name")
        if label is None:
            raise DataError(f"{where} ({name}) has no label, a whole number or the name of a class")
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\0" in name:
            raise DataError(f"{where}: {name!r} is no file under {file.parent}")
        picture = file.parent.joinpath(*parts)
        if not picture.is_file():
            raise DataError(f"{where}: {picture} is not there")
        path = "/".join(parts)
        if path in seen:
            raise DataError(f"{where} lists {name} a second time")
        seen.add(path)
        splits.add(row.get("split"))
        pictures.append(Picture(picture, prefix + path, label))
    if len(splits) > 1:
        raise DataError(
            f"{file} has a column 'split': give each split, train and test, a folder with a list of its own"
        )
    return pictures


def has_labels(file: Path) -> bool:
    """Whether it is a list of labels, and not only of other things that are known of the pictures."""
    first = next(iter(rows_of(file)), None)
    return first is None or "label" in first


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """Each row's columns. DataError when the file cannot be read as what its name says."""
    try:
        if file.suffix == ".parquet":
            yield from pq.read_table(file).to_pylist()
        elif file.suffix == ".csv":
            with file.open(encoding="utf-8-sig", newline="") as stream:
                for row in csv.DictReader(stream, strict=True):
                    yield {str(key): value for key, value in row.items() if key is not None}
        else:
            with file.open(encoding="utf-8-sig") as stream:
                for number, line in enumerate(stream):
                    if line.strip():
                        row = json.loads(line)
                        if not isinstance(row, dict):
                            raise ValueError(f"line {number + 1} is no object")
                        yield row
    except (pa.ArrowException, csv.Error, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from None


def label_of(value: Any) -> int | str | None:
    """A class's number, also where it is written 7.0 or as text; its name; None where there is neither."""
    if isinstance(value, str):
        text = value.strip()
        return int(text.partition(".")[0]) if WHOLE.fullmatch(text) else text or None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
