"""Bounds that more than one room keeps to."""

from __future__ import annotations

MAX_CLASSES = 4096
MAX_SEED = 2**32 - 1
MAX_GUIDANCE = 20
MAX_STEPS = 1000  # of a request over HTTP, and where steps are counted without a model
SIDE = 28  # height and width of every image of the service
