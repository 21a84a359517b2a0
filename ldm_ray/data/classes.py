"""The names of classes, and the class that a text names. A class is a number, its position in the names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.limits import MAX_CLASSES

MAX_NAME = 100
FILLERS = {"a", "an", "the", "digit", "number", "handwritten", "image", "picture", "of"}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def numbered(count: int) -> tuple[str, ...]:
    """The names of classes that have none: ``0``, ``1``, …"""
    return tuple(map(str, range(count)))


def usable_names(value: Any) -> tuple[str, ...] | None:
    """Names out of a dataset's or a checkpoint's metadata, or None where they are not different printable texts."""
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MAX_CLASSES:
        return None
    fine = all(isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable() for name in value)
    return tuple(value) if fine and len(set(value)) == len(value) else None


def names_in(info: dict[str, Any], count: int) -> tuple[str, ...]:
    """The class names of a checkpoint from its ``data`` record; their numbers where it has no usable ones."""
    data = info.get("data")
    names = usable_names(data.get("class_names")) if isinstance(data, dict) else None
    return names if names is not None and len(names) == count else numbered(count)


def labels_in(info: dict[str, Any], count: int) -> tuple[int, ...]:
    """The classes that are sampled by default: those that a checkpoint's ``data`` record does not say had no image."""
    data = info.get("data")
    absent = data.get("without_images") if isinstance(data, dict) else None
    labels = tuple(label for label in range(count) if not isinstance(absent, (list, tuple)) or label not in absent)
    return labels or tuple(range(count))


def class_of(text: str, names: Sequence[str]) -> int:
    """The class that a text names: by its name, else by its number, else by a digit's English word.

    A name wins over a number: of the classes ``1`` and ``2``, the text 1 is the first. ConfigError on anything else.
    """
    wanted = text.strip()
    if wanted in names:
        return list(names).index(wanted)
    folded = [name.casefold() for name in names]
    if folded.count(wanted.casefold()) == 1:
        return folded.index(wanted.casefold())
    if wanted in numbered(len(names)):
        return int(wanted)
    digit = str(WORDS.index(wanted.lower())) if wanted.lower() in WORDS else ""
    if digit in names:
        return list(names).index(digit)
    raise ConfigError(f"{wanted[:MAX_NAME]!r} is no class of the model; its classes are {listing(names)}")


def classes_of(text: str, names: Sequence[str]) -> list[int]:
    """The classes of a text with commas; the whole text first, since a name may hold commas."""
    try:
        return [class_of(text, names)]
    except ConfigError:
        if "," not in text:
            raise
        return [class_of(part, names) for part in text.split(",")]


def class_in(prompt: str, names: Sequence[str]) -> int:
    """The class that a prompt names with other words around it, such as ``a picture of a seven``. ConfigError."""
    every = words_of(prompt)
    fewer = [word for word in every if word not in FILLERS]
    matches = [i for i, name in enumerate(names) if words_of(name) and words_of(name) in (every, fewer)]
    if len(matches) == 1:
        return matches[0]
    try:
        return class_of(fewer[0] if len(fewer) == 1 else prompt, names)
    except ConfigError:
        known = 'one digit, such as "7" or "seven"' if tuple(names) == numbered(10) else f"one class: {listing(names)}"
        raise ConfigError(f"a prompt names {known}") from None


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def listing(names: Sequence[str], most: int = 12) -> str:
    """The names in a line: ``0 to 9``, or a list that ends in … where it is long."""
    if len(names) > 1 and tuple(names) == numbered(len(names)):
        return f"0 to {len(names) - 1}"
    return ", ".join(names[:most]) + ", …" * (len(names) > most)
