"""Records: JSON lines, one a record, and the name that follows from one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from ldm_ray.files.paths import AnyPath, append_line, write_bytes

Record = dict[str, Any]


def read_records(file: AnyPath) -> list[Record]:
    """None where the file does not exist. ValueError on a line that is no JSON."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.strip()]


def append_record(file: AnyPath, record: Record) -> None:
    """Adds a line, or nothing, to a file that nobody else writes."""
    append_line(file, json.dumps(record))


def write_records(file: AnyPath, records: Iterable[Record], finite: bool = False) -> None:
    """Writes the file at once or not at all. finite: ValueError on a number that is not."""
    write_bytes(file, "".join(json.dumps(record, allow_nan=not finite) + "\n" for record in records).encode())


def fingerprint(identity: Record, digits: int = 24) -> str:
    """Hexadecimal digits that follow from the values, whatever their order."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:digits]
