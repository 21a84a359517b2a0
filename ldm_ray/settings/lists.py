"""Texts that list numbers, such as 0-4,9."""

from __future__ import annotations

import re

from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.limits import MAX_SEED

MOST_LISTED = 1000  # numbers of a text such as 0-9


def seeds_in(text: str) -> list[int]:
    """The different seeds of ``--seeds`` with commas between, ranges among them, such as 0-4,9. ConfigError."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,10})(?:\s*-\s*(\d{1,10}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= MAX_SEED or last - first >= MOST_LISTED:
            raise ConfigError(
                f"--seeds is numbers from 0 to {MAX_SEED} and rising ranges with commas between, such as 0-4,9, at "
                f"most {MOST_LISTED} of them; {part.strip()!r:.60} is neither"
            )
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds) or len(seeds) > MOST_LISTED:
        raise ConfigError(f"--seeds is different numbers, at most {MOST_LISTED} of them, not {text!r:.60}")
    return seeds


def listed(flag: str, text: str, pattern: str, high: float) -> list[float]:
    """The different numbers of a text such as 0,1,2. ConfigError unless each fits the pattern and is at most high."""
    parts = [part.strip() for part in text.split(",")]
    values = [float(part) for part in parts if re.fullmatch(pattern, part, re.ASCII)]
    if len(values) < len(parts) or max(values) > high or len(set(values)) < len(values):
        raise ConfigError(
            f"{flag} is different numbers from 0 to {high} with commas between, such as 1,2, not {text!r}"
        )
    return values
