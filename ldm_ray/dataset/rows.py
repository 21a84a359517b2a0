"""Which seed and which label each position of a dataset has, without a list of them.

N positions, n of a stretch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ldm_ray.data.classes import class_of, numbered
from ldm_ray.diffusion.noise import LOW, philox
from ldm_ray.files.paths import local_path
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.limits import MAX_SEED

LABEL_BLOCK = 2**40  # of a seed's Philox stream: far beyond those that any number of steps draws noise from
CHUNK = 1 << 22  # bytes of a label file read at a time


class Seeds:
    """Ranges of seeds one after the other; ``5`` is the range 5-5. Ranges that adjoin are one."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        joined: list[tuple[int, int]] = []
        for first, last in ranges:
            if joined and joined[-1][1] + 1 == first:
                joined[-1] = joined[-1][0], last
            else:
                joined.append((first, last))
        self.starts = np.array([first for first, _ in joined], dtype=np.int64)
        lengths = np.array([last - first + 1 for first, last in joined], dtype=np.int64)
        self.ends = lengths.cumsum()  # positions

    @classmethod
    def parse(cls, text: str) -> Seeds:
        """``0-999999,5,7``. ConfigError on anything else."""
        ranges = []
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\d{1,20})(?:\s*-\s*(\d{1,20}))?\s*", part, re.ASCII)
            if not match:
                raise ConfigError(f"--seeds takes numbers and ranges such as 0-999999,5,7; {part!r:.60} is neither")
            first, last = int(match[1]), int(match[2] or match[1])
            if not first <= last <= MAX_SEED:
                raise ConfigError(f"--seeds {part.strip()}: a range rises, and a seed is 0 to {MAX_SEED}")
            ranges.append((first, last))
        return cls(ranges)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __str__(self) -> str:
        lengths = np.diff(self.ends, prepend=0).tolist()
        pairs = zip(self.starts.tolist(), lengths, strict=True)
        return ",".join(str(first) if n == 1 else f"{first}-{first + n - 1}" for first, n in pairs)

    def rows(self, first: int, last: int) -> np.ndarray:
        """Seeds (last − first,) int64 of the positions from first to before last."""
        positions = np.arange(first, last, dtype=np.int64)
        which = np.searchsorted(self.ends, positions, side="right")
        begins = self.ends - np.diff(self.ends, prepend=0)
        return self.starts[which] + positions - begins[which]


@dataclass(frozen=True)
class Labels:
    """A label for each position: from a cycle, from the seed (an empty cycle), or from ``values`` (N,) int16.

    drawn: the classes that the seed chooses from; empty for all.
    """

    rule: str
    num_classes: int
    cycle: tuple[int, ...] = ()
    values: np.ndarray | None = None
    drawn: tuple[int, ...] = ()

    @classmethod
    def parse(
        cls,
        text: str,
        num_classes: int,
        count: int,
        only: int | None = None,
        names: Sequence[str] = (),
        usual: Sequence[int] = (),
    ) -> Labels:
        """``balanced``, ``random``, ``random:0-4,9``, ``7``, ``0-4,9``, names of classes or ``file:PATH`` with
        ``count`` labels.

        names: of all classes, to be used beside their numbers, which the rule keeps. only: the one class that the
        checkpoint was trained on. usual: the classes of ``balanced`` and ``random``, all where there are none; a rule
        names them where they are not all. ConfigError on labels that cannot be.
        """
        some = () if len(usual) == num_classes else tuple(usual)
        if text.startswith("file:"):
            values = read_labels(local_path(text.removeprefix("file:")), num_classes, count)
            made = cls(f"file:{hashlib.sha256(values.tobytes()).hexdigest()}", num_classes, values=values)
            used = set(np.unique(values).tolist())
        elif text == "random" and only is None and not some:
            return cls("random", num_classes)
        elif text.startswith("random:") or (text == "random" and only is None):
            drawn = parse_cycle(text.removeprefix("random:"), num_classes, names) if ":" in text else some
            made, used = cls(f"random:{','.join(map(str, drawn))}", num_classes, drawn=drawn), set(drawn)
        elif text in ("balanced", "random"):
            cycle = (only,) if only is not None else some or tuple(range(num_classes))
            rule = text if only is None and not some else ",".join(map(str, cycle))
            return cls(rule, num_classes, cycle)
        else:
            cycle = parse_cycle(text, num_classes, names)
            made, used = cls(",".join(map(str, cycle)), num_classes, cycle), set(cycle)
        if only is not None and used != {only}:
            raise ConfigError(f"the checkpoint was trained on digit {only} alone: --labels {text:.60} asks for others")
        return made

    def rows(self, first: int, seeds: np.ndarray) -> np.ndarray:
        """Labels (n,) int64 of the positions from ``first`` on, which have these seeds (n,)."""
        if self.values is not None:
            return self.values[first : first + len(seeds)].astype(np.int64)
        if self.cycle:
            return np.array(self.cycle, dtype=np.int64)[np.arange(first, first + len(seeds)) % len(self.cycle)]
        words = philox(torch.from_numpy(seeds), torch.tensor([LABEL_BLOCK]))[:, 0, 0]
        classes = np.array(self.drawn or range(self.num_classes), dtype=np.int64)
        return classes[((((words >> 32) & LOW) * len(classes)) >> 32).numpy()]


def parse_cycle(text: str, num_classes: int, names: Sequence[str] = ()) -> tuple[int, ...]:
    cycle: list[int] = []
    for part in [text] if text in names else text.split(","):
        if part.strip() in names:
            cycle.append(list(names).index(part.strip()))
            continue
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part, re.ASCII)
        if not match:
            try:
                cycle.append(class_of(part, names or numbered(num_classes)))
            except ConfigError as error:
                raise ConfigError(
                    f"--labels {text:.60}: {error}; allowed are balanced, random, classes such as 7 or 0-4,9, and "
                    "file:PATH"
                ) from None
            continue
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < num_classes:
            raise ConfigError(f"--labels {part.strip()}: a range rises, and a label is 0 to {num_classes - 1}")
        cycle += range(first, last + 1)
    return tuple(cycle)


def read_labels(path: Path, num_classes: int, count: int) -> np.ndarray:
    """(count,) int16 from a text file of labels, apart by white space or commas; read a stretch at a time."""
    values, filled, rest = np.empty(count, dtype=np.int16), 0, ""
    try:
        with path.open(encoding="ascii") as stream:
            while True:
                chunk = stream.read(CHUNK)
                words = (rest + chunk).replace(",", " ").split()
                rest = words.pop() if chunk and words and not chunk[-1].isspace() and chunk[-1] != "," else ""
                found = np.array(words, dtype=np.int64)
                if len(found) and not 0 <= found.min() <= found.max() < num_classes:
                    bad = found[(found < 0) | (found >= num_classes)][0]
                    raise ConfigError(f"--labels file:{path} holds {bad}; a label is 0 to {num_classes - 1}")
                if filled + len(found) > count:
                    raise ConfigError(f"--labels file:{path} holds more labels than the {count:,} seeds")
                values[filled : filled + len(found)] = found
                filled += len(found)
                if not chunk:
                    break
    except OSError as error:
        raise ConfigError(f"--labels file:{path} cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, ValueError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--labels file:{path} is a text of whole numbers: {error}") from None
    if filled != count:
        raise ConfigError(f"--labels file:{path} holds {filled:,} labels for {count:,} seeds")
    return values
