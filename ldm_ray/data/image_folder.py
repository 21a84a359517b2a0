"""A folder of PNGs as a table in the schema of the hub's image datasets. Known are these layouts:

- ``train/CLASS/*.png`` and ``test/CLASS/*.png``; the folders may be called ``training`` and ``testing`` too;
- ``CLASS/*.png`` without splits: then a tenth is the test split, the images whose ``CLASS/FILE`` has a SHA-256 that
  is divisible by ten, whatever other images there are;
- the hub's ``imagefolder``: a ``metadata.csv``, ``.jsonl`` or ``.parquet`` with file_name and label in the folder of
  each split, or above them, or without splits, where again a tenth is the test split;
- what ``python -m ldm_ray.generate --format png`` writes.

Any of them may be in ``data/``. Anything else is refused; pictures that are passed over are counted in the log.
Named classes are those of both splits, in the order of their numbers where all names are numbers, else of their names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ldm_ray.data.classes import numbered, usable_names
from ldm_ray.data.metadata import METADATA, Picture, has_labels, listed, metadata_in
from ldm_ray.data.parquet_folder import SPLITS, check_shards, names_of
from ldm_ray.data.walk import files_below, folders_in, is_picture, pictures_in
from ldm_ray.settings.errors import DataError
from ldm_ray.settings.limits import MAX_CLASSES

SPELLINGS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
NO_CLASS = re.compile(  # train_images, trainingSet, val, images: what a folder of no class is called
    r"(.*[^a-z])?(train(ing)?|test(ing)?|val(id(ation)?)?|dev|eval(uation)?)[^a-z]?(set|data|images?|imgs?|split|fold)?"
    r"[^a-z]*|images?|imgs?|pictures?|pngs?|data",
    re.IGNORECASE,
)
SHARD = re.compile(r"(train|test)-\d+-of-\d+")
LAYOUTS = "train/CLASS/*.png, CLASS/*.png, or a metadata.csv or .jsonl with file_name and label beside the pictures"
PREVIEW = "preview.png"  # what generate puts above its images, and is none of them
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
log = logging.getLogger(__name__)


def is_one(folder: Path) -> bool:
    """Whether there is any picture in the folder, or a list of pictures, laid out in whatever way."""
    return any(is_picture(file) or file.name in METADATA for file in files_below(folder)) or any(
        map(pictures_in, folders_in(folder))
    )


def read(folder: Path, split: str) -> tuple[pa.Table, tuple[str, ...] | None]:
    """(table of ``image: struct<bytes, path>``, ``label: int64``, class names, None where labels are numbers alone).

    DataError: no image of the split, or a layout that is not known.
    """
    splits, names = layout(folder, split)
    pictures = splits[split]
    if not pictures:
        raise DataError(f"--dataset {folder} has no image for the split {split!r}; known are {LAYOUTS}")
    tell_passed_over(folder, split, splits)
    labels = {name: label for label, name in enumerate(names or ())}
    rows = [{"bytes": picture.file.read_bytes(), "path": picture.path} for picture in pictures]
    numbers = [picture.label if isinstance(picture.label, int) else labels[picture.label] for picture in pictures]
    return pa.table({"image": pa.array(rows, IMAGE), "label": pa.array(numbers, pa.int64())}), names


def layout(folder: Path, asked: str) -> tuple[dict[str, list[Picture]], tuple[str, ...] | None]:
    """(the pictures of each split, class names). DataError where those of the split that is asked for are not known."""
    data = folder / "data"
    base = data if not split_folders(folder) and (split_folders(data) or shards(data)) else folder
    if shards(base):
        return generated(folder, base)
    folders, above = split_folders(base), metadata_in(base)
    if above is not None and has_labels(above):
        splits, lists = by_first_folder(base, listed(above)), [above]
    elif folders:
        splits, lists = {split: [] for split in SPLITS}, []
        for split, each in folders.items():
            try:
                splits[split], own = pictures_of(each)
                lists += own
            except DataError:  # such as a test split without labels, which training does not need
                if split == asked:
                    raise
    else:
        pictures, lists = pictures_of(base)
        splits = divided(pictures)
    return named(folder, splits, lists)


def split_folders(base: Path) -> dict[str, Path]:
    """The folder of each split, where it has any picture or list below it. DataError: one split twice."""
    folders: dict[str, Path] = {}
    for each in folders_in(base):
        split = SPELLINGS.get(each.name.lower())
        if split and is_one(each):
            if split in folders:
                raise DataError(
                    f"{base} has {folders[split].name} and {each.name}: which of them is the {split} split?"
                )
            folders[split] = each
    return folders


def pictures_of(base: Path) -> tuple[list[Picture], list[Path]]:
    """(the pictures of one folder by its list, else by the folders of its classes; the list, if there is one)."""
    file = metadata_in(base)
    if file is not None and has_labels(file):
        return listed(file), [file]
    loose, classes = pictures_in(base), [each for each in folders_in(base) if pictures_in(each)]
    if loose and not classes:
        what = f"{file.name} has no column 'label'" if file else "no metadata.csv or .jsonl lists them"
        raise DataError(
            f"{base} has pictures ({loose[0].name}) in no folder of a class, and {what}: known are {LAYOUTS}"
        )
    if not classes:
        deeper = next((file for file in files_below(base) if is_picture(file)), None)
        if deeper:
            raise DataError(f"{base} has its pictures elsewhere ({deeper.relative_to(base)}): known are {LAYOUTS}")
    if classes and all(NO_CLASS.fullmatch(each.name) for each in classes):
        names = ", ".join(each.name for each in classes[:4])
        raise DataError(f"{base}: folders named {names} do not look like classes: known are {LAYOUTS}")
    pictures = []
    for each in classes:
        pngs = [file for file in pictures_in(each) if file.suffix.lower() == ".png"]
        if not pngs:
            raise DataError(f"{each} has no PNG, and {kinds(pictures_in(each))}: convert them, or remove the class")
        pictures += [Picture(file, f"{each.name}/{file.name}", each.name) for file in pngs]
    empty = [each.name for each in folders_in(base) if each not in classes and not is_one(each)]
    if classes and empty:
        log.warning("WARNING: no picture in %s of %s.", ", ".join(empty[:5]), base)
    return pictures, []


def by_first_folder(base: Path, pictures: Sequence[Picture]) -> dict[str, list[Picture]]:
    """Those of a list above the splits, by the folder that their paths begin with. DataError: some in none."""
    splits: dict[str, list[Picture]] = {split: [] for split in SPLITS}
    others: list[Picture] = []
    for picture in pictures:
        first = picture.path.partition("/")[0].lower() if "/" in picture.path else ""
        (splits[SPELLINGS[first]] if first in SPELLINGS else others).append(picture)
    if others and any(splits.values()):
        raise DataError(f"{base}: the metadata lists pictures in and outside of split folders ({others[0].path})")
    return divided(others) if others else splits


def divided(pictures: Sequence[Picture]) -> dict[str, list[Picture]]:
    """Of a dataset without splits: each picture by its path alone."""
    return {split: [picture for picture in pictures if in_split(picture.path, split)] for split in SPLITS}


def in_split(path: str, split: str) -> bool:
    return (int(hashlib.sha256(path.encode()).hexdigest(), 16) % 10 == 0) == (split == "test")


def shards(base: Path) -> list[Path]:
    """The folders that ``generate --format png`` fills."""
    return [each for each in folders_in(base) if SHARD.fullmatch(each.name) and is_one(each)]


def generated(folder: Path, base: Path) -> tuple[dict[str, list[Picture]], tuple[str, ...] | None]:
    """A dataset that generate has made. DataError while it is not complete."""
    splits: dict[str, list[Picture]] = {split: [] for split in SPLITS}
    folders = shards(base)
    for split in SPLITS:
        check_shards(folder, [each.name for each in folders if each.name.startswith(f"{split}-")])
    for each in folders:
        file = metadata_in(each)
        if file is None:
            raise DataError(f"{each} has no metadata.jsonl: the job that writes it did not finish; run it again")
        splits[each.name.partition("-")[0]] += listed(file, f"{each.name}/")
    try:
        count = json.loads((folder / "manifest.json").read_text("utf-8"))["num_classes"]
        return splits, numbered(count) if 1 <= count <= MAX_CLASSES else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return splits, None


def named(
    folder: Path, splits: dict[str, list[Picture]], lists: Iterable[Path]
) -> tuple[dict[str, list[Picture]], tuple[str, ...] | None]:
    """The splits with the names of their classes: of the lists' ``ClassLabel``, or those that the labels are."""
    labels = {picture.label for pictures in splits.values() for picture in pictures}
    if not labels:
        return splits, None
    every = {label for label in labels if isinstance(label, int)}
    if every and every == labels:
        known = {names_of(pq.read_schema(file)) for file in lists if file.suffix == ".parquet"} - {None}
        if len(known) > 1:
            raise DataError(f"--dataset {folder}: the lists of the splits have their classes in different orders")
        usual = numbered(max(every) + 1) if 0 <= min(every) <= max(every) < MAX_CLASSES else None
        return splits, next(iter(known), usual)
    texts = set(map(str, labels))
    numbers = all(map(is_number, texts))
    names = usable_names(sorted(texts, key=lambda name: (int(name) if numbers else 0, name)))
    if names is None:
        raise DataError(f"--dataset {folder}: classes have printable names, and are at most {MAX_CLASSES}")
    order = {name: label for label, name in enumerate(names)}
    by_class: dict[str, list[Picture]] = {}
    for split, pictures in splits.items():
        as_text = [Picture(picture.file, picture.path, str(picture.label)) for picture in pictures]
        by_class[split] = sorted(as_text, key=lambda picture: order[str(picture.label)])
    return by_class, names


def is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def tell_passed_over(folder: Path, split: str, splits: dict[str, list[Picture]]) -> None:
    """Logs how many pictures no split has, by their kinds, with one of them."""
    read = {picture.file for pictures in splits.values() for picture in pictures}
    others = (file for file in files_below(folder) if is_picture(file) and file not in read)
    over = [file for file in others if file != folder / PREVIEW]
    if over:
        log.warning(
            "WARNING: %s (%s): %s passed over (%s), such as %s.",
            folder, split, f"{len(over):,} of {len(over) + len(read):,} pictures", kinds(over),
            over[0].relative_to(folder),
        )  # fmt: skip


def kinds(files: Iterable[Path]) -> str:
    """Such as ``12 .jpg, 3 .bmp``."""
    counts = Counter(file.suffix.lower() for file in files)
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])))
