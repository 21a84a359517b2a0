"""Numbers with their nouns."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """``1 image``, ``1,000 images``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
