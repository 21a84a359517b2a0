"""Which images a checkpoint was trained on; reading those, or others with a note that says so."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ldm_ray.data.sources import ImageSource, content_hash, load_source
from ldm_ray.settings.errors import ConfigError, DataError

log = logging.getLogger(__name__)


def dataset_of(info: dict[str, Any]) -> str | None:
    """``--dataset`` of a checkpoint's images, from its ``info``; None where the file does not say."""
    name = (info.get("data") or {}).get("dataset")
    folder = (info.get("config") or {}).get("dataset")
    if name != "folder":
        return name if isinstance(name, str) else None
    return folder if isinstance(folder, str) else None


def is_of(source: ImageSource, info: dict[str, Any]) -> bool | None:
    """Whether a training split, of the same single class if any, is what a checkpoint of this ``info`` was trained
    on, by its content; None where the file does not say."""
    data = info.get("data") or {}
    if not data.get("revision"):
        return None
    return data["revision"] == source.revision or data.get("content") == content_hash(source.table)


def load_own(
    info: dict[str, Any], path: object, named: str | None, cache_dir: Path, only_digit: int | None = None
) -> tuple[list[ImageSource], list[str]]:
    """([training, test split], notes on what a reader must know) of a checkpoint's own images, or of those ``named``.

    info, path: the checkpoint's. only_digit: the one class it was trained on. Raises ConfigError when its images are
    not where it says, or are others now; DataError as ``load_source``. Other images that are named are only noted.
    """
    own = dataset_of(info)
    dataset = named or own or "auto"
    try:
        train = load_source(dataset, "train", cache_dir, only_digit)
    except DataError as error:
        if named or not own:
            raise
        raise ConfigError(f"{path} was trained on {own}, which is not there ({error}): name it by --dataset") from None
    test = load_source(train.name, "test", cache_dir, only_digit)  # by its name: of the same place, whatever "auto" is
    same, notes = is_of(train, info), []
    if same is None and not named:
        notes.append(f"{path} does not say which images it was trained on; these are {train.name}")
    elif same is False and not named:
        raise ConfigError(
            f"{path} was trained on {own}, whose images have changed since: name those it was trained on, or others "
            "to compare with, by --dataset"
        )
    elif same is False:
        notes.append(f"{path} was trained on other images ({own}) than {train.name}, with which it is compared")
    warn(notes)
    return [train, test], notes


def warn(notes: list[str]) -> None:
    for note in notes:
        log.warning("WARNING: %s", note)
