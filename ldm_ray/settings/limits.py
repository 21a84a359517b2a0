"""Bounds that more than one room keeps to."""

from __future__ import annotations

MAX_CLASSES = 4096
