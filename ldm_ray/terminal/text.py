"""Words from files and from strangers, fit to be shown: cut before they are formatted, nothing that moves a cursor."""

from __future__ import annotations

from typing import Any

MAX_DIGITS = 200  # bits of a whole number that is written out


def shown(value: Any, most: int = 80) -> str:
    """A value in at most about ``most`` printable characters; of a container only what it is, but for a few numbers."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > MAX_DIGITS:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (bool, int, float)) or value is None:
        return str(value)
    if isinstance(value, (list, tuple)) and len(value) <= 4 and all(type(each) in (int, float) for each in value):
        return f"[{', '.join(shown(each) for each in value)}]"
    if isinstance(value, (list, tuple, dict, set, bytes)):
        return f"a {type(value).__name__} of {len(value)}"
    text = value if isinstance(value, str) else str(value)
    return escaped(text[:most]) + "…" * (len(text) > most)


def quoted(value: Any, most: int = 80) -> str:
    """A text in quotes, anything else as ``shown``."""
    return f"'{shown(value, most)}'" if isinstance(value, str) else shown(value, most)


def listed(names: Any, most: int = 5) -> str:
    """The first of some names, quoted, with commas between."""
    first = [quoted(name, 40) for name, _ in zip(names, range(most), strict=False)]
    return ", ".join(first) + ", …" * (len(names) > most) if first else "nothing"


def escaped(text: str) -> str:
    """Control characters, line breaks and halves of characters as backslash sequences."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
