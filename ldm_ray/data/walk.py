"""What is in a folder that the user named: files in the order of their names, without hidden ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".jp2", ".heic")


def folders_in(folder: Path) -> list[Path]:
    """The folders right below, links to folders among them. OSError: one that cannot be listed."""
    entries = folder.iterdir() if folder.is_dir() else []
    return sorted(entry for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def pictures_in(folder: Path) -> list[Path]:
    """The pictures right in a folder, of whatever kind. OSError: one that cannot be listed."""
    entries = folder.iterdir() if folder.is_dir() else []
    return sorted(entry for entry in entries if is_picture(entry) and not entry.is_dir())


def is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURES and not file.name.startswith(".")


def files_below(folder: Path) -> Iterator[Path]:
    """Every file at any depth; hidden folders are not gone into, nor is one a second time. OSError as above."""
    seen = {os.path.realpath(folder)}

    def is_new(place: str) -> bool:
        real = os.path.realpath(place)
        new = real not in seen
        seen.add(real)
        return new

    def stop(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        named = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in named if is_new(os.path.join(place, name))]
        yield from (Path(place, name) for name in sorted(files) if not name.startswith("."))
