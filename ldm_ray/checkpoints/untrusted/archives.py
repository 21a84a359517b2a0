"""The three layouts that weights come in: torch's zip archive, the one before it, and safetensors. Each becomes a
dictionary whose tensors are not read yet."""

from __future__ import annotations

import io
import json
import struct
from dataclasses import dataclass
from typing import Any

import torch

from ldm_ray.checkpoints.untrusted.classes import Name
from ldm_ray.checkpoints.untrusted.pickles import Machine
from ldm_ray.checkpoints.untrusted.tensors import DTYPES, Source, Storage, Stored, Unread, contiguous
from ldm_ray.settings.errors import CheckpointError
from ldm_ray.terminal.text import listed, quoted

MAX_ENTRIES = 50_000
MAX_DIRECTORY = 16 * 2**20
MAX_PICKLE = 64 * 2**20
MAX_HEADER = 16 * 2**20
END, END64, LOCATOR = 22, 56, 20  # bytes of the records that end a zip archive
ENTRY, LOCAL = 46, 30  # of an entry in its directory, and before its data, without names
FULL = 0xFFFFFFFF
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save's magic number as a pickle
SAFETENSORS: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """A file of an archive: its name, where its data begins, how long it is."""

    name: str
    start: int
    size: int


def read_zip(source: Source) -> Any:
    """What ``torch.save`` writes today. CheckpointError or ValueError."""
    entries = zip_entries(source)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(f"is a zip archive, but none of torch.save: it holds {listed(list(entries))}")
    root = pickles[0].partition("/")[0]
    if f"{root}/constants.pkl" in entries:
        raise CheckpointError("is a TorchScript program, not weights: save its state_dict() instead")
    order = entries.get(f"{root}/byteorder")
    if order and source.bytes_at(order.start, min(order.size, 10)) != b"little":
        raise CheckpointError("was written by a big-endian machine")
    data = entries[pickles[0]]
    if data.size > MAX_PICKLE:
        raise CheckpointError(f"holds {data.size:,} bytes beside its tensors; at most {MAX_PICKLE:,} are read")

    def storage(identity: Any) -> Any:
        dtype, key, location, count = storage_of(identity)
        if location == "meta" or dtype is None:
            return Unread("a tensor without numbers" if dtype else "a quantised tensor")
        entry = entries.get(f"{root}/data/{key}")
        if entry is None:
            raise CheckpointError(f"is damaged: the numbers {quoted(key, 40)} of a tensor are not in it")
        return Storage(dtype, min(entry.size, count * dtype.itemsize), source, entry.start)

    return Machine(storage).run(io.BytesIO(source.bytes_at(data.start, data.size)))


def storage_of(identity: Any) -> tuple[torch.dtype | None, str, Any, int]:
    """(type, None for a quantised one; key; place; count of numbers) of a persistent id. ValueError."""
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise ValueError("it names something that is no storage")
    _, kind, key, location, count = identity[:5]
    name = kind.full.rpartition(".")[2] if isinstance(kind, Name) else ""
    if not name.endswith("Storage") or not isinstance(key, str) or type(count) is not int or count < 0:
        raise ValueError("a storage of an unknown type")
    return DTYPES.get(name), key[:100], location, count


def zip_entries(source: Source) -> dict[str, Entry]:
    """The directory of a zip archive whose entries are stored as they are, lie side by side, and are described once."""
    start, size, count = zip_directory(source)
    if count > MAX_ENTRIES or size > MAX_DIRECTORY:
        raise CheckpointError(f"is a zip archive of {count:,} entries; at most {MAX_ENTRIES:,} are read")
    directory, entries, at = source.bytes_at(start, size), {}, 0
    taken: list[tuple[int, int]] = []
    for _ in range(count):
        if directory[at : at + 4] != b"PK\1\2":
            raise ValueError("its zip directory is damaged")
        method = struct.unpack_from("<H", directory, at + 10)[0]
        packed, plain, named, extra, comment = struct.unpack_from("<IIHHH", directory, at + 20)
        begins = struct.unpack_from("<I", directory, at + 42)[0]
        name = directory[at + ENTRY : at + ENTRY + named].decode("utf-8", "replace")
        more = directory[at + ENTRY + named : at + ENTRY + named + extra]
        plain, packed, begins = widened(more, plain, packed, begins)
        at += ENTRY + named + extra + comment
        if method or packed != plain:
            raise CheckpointError("holds compressed entries, which torch.save never writes")
        local = source.bytes_at(begins, LOCAL)
        if local[:4] != b"PK\3\4" or name in entries:
            raise ValueError("its zip directory is damaged")
        first = begins + LOCAL + sum(struct.unpack_from("<HH", local, 26))
        taken.append((begins, first + plain))
        entries[name] = Entry(name, first, plain)
    if at != size:
        raise ValueError("its zip directory is damaged")
    ends = [0, *(end for _, end in sorted(taken))]
    if any(begin < end for (begin, _), end in zip(sorted(taken), ends, strict=False)) or ends[-1] > start:
        raise CheckpointError("is a zip archive whose entries overlap")
    return entries


def zip_directory(source: Source) -> tuple[int, int, int]:
    """(start, size, entries) of the directory, which ends where the end records begin. ValueError."""
    end = source.size - END
    record = source.bytes_at(end, END)
    if record[:4] != b"PK\5\6" or record[20:] != b"\0\0":
        raise ValueError("its zip directory is not at its end")
    count, size, start = struct.unpack_from("<HII", record, 10)
    locator = source.bytes_at(end - LOCATOR, LOCATOR) if end >= LOCATOR + END64 else b""
    if locator[:4] == b"PK\6\7":
        end -= LOCATOR + END64
        record = source.bytes_at(end, END64)
        if record[:4] != b"PK\6\6" or struct.unpack_from("<Q", locator, 8)[0] != end:
            raise ValueError("its zip directory is damaged")
        wide = struct.unpack_from("<QQQ", record, 32)
        for value, other, most in zip((count, size, start), wide, (0xFFFF, FULL, FULL), strict=True):
            if value not in (other, most):
                raise ValueError("its two zip directories differ")
        count, size, start = wide
    if start + size != end:
        raise ValueError("its zip directory does not end at its end record")
    return start, size, count


def widened(extra: bytes, *values: int) -> tuple[int, ...]:
    """Sizes and offset of an entry, where they do not fit their 32 bits from its zip64 field."""
    wide, at = iter(()), 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{min(size, 24) // 8}Q", extra, at + 4))
        at += 4 + size
    return tuple(next(wide, value) if value == FULL else value for value in values)


def read_legacy(source: Source) -> Any:
    """What ``torch.save`` wrote before its zip archives: pickles, then the numbers of every storage."""
    stream = io.BytesIO(source.bytes_at(0, min(source.size, MAX_PICKLE)))
    storages: dict[str, tuple[torch.dtype, int]] = {}
    waiting: dict[str, Storage] = {}

    def storage(identity: Any) -> Any:
        dtype, key, _, count = storage_of(identity)
        if dtype is None:
            raise CheckpointError("holds quantised tensors")
        if len(identity) > 5 and identity[5] is not None:
            raise CheckpointError("holds views of storages, as torch wrote them before version 0.4")
        storages.setdefault(key, (dtype, count))
        return waiting.setdefault(key, Storage(dtype, count * dtype.itemsize, source))

    def nothing(_: Any) -> Any:
        raise ValueError("a storage where none belongs")

    _, version, system = (Machine(nothing).run(stream) for _ in range(3))
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError("was written by another kind of torch or machine")
    content = Machine(storage).run(stream)
    keys, at = Machine(nothing).run(stream), stream.tell()
    known = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not known or len(keys) != len(storages) or set(keys) != set(storages):
        raise ValueError("its list of storages does not fit")
    for key in keys:
        dtype, count = storages[key]
        size = count * dtype.itemsize
        if struct.unpack("<q", source.bytes_at(at, 8))[0] != count or at + 8 + size > source.size:
            raise ValueError("it ends before what it announces")
        object.__setattr__(waiting[key], "start", at + 8)  # known only now
        at += 8 + size
    return content


def read_safetensors(source: Source) -> dict[str, Any]:
    """A dictionary of tensors, with the texts of ``__metadata__`` as ``args``."""
    size = struct.unpack("<Q", source.bytes_at(0, 8))[0]
    if size > MAX_HEADER:
        raise CheckpointError(f"has a header of {size:,} bytes; at most {MAX_HEADER:,} are read")
    header = json.loads(source.bytes_at(8, size))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    texts = header.pop("__metadata__", None) or {}
    weights: dict[str, Any] = {}
    taken: list[tuple[int, int]] = []
    for name, entry in header.items():
        dtype = SAFETENSORS.get(str(entry["dtype"]))
        first, last = entry["data_offsets"]
        if type(first) is not int or type(last) is not int or not 0 <= first <= last <= source.size - 8 - size:
            raise ValueError("a tensor lies outside of it")
        taken.append((first, last))
        if dtype is None:
            weights[name] = Unread(f"of type {quoted(str(entry['dtype']), 20)}")
            continue
        tensor: Stored = contiguous(Storage(dtype, last - first, source, 8 + size + first), entry["shape"])
        if tensor.numel() * dtype.itemsize != last - first:
            raise ValueError("a tensor has another size than its shape says")
        weights[name] = tensor
    taken.sort()
    if any(begin < end for (begin, _), (_, end) in zip(taken[1:], taken[:-1], strict=True)):
        raise ValueError("its tensors overlap")
    return weights | {"args": {str(key): number_in(value) for key, value in texts.items()}} if texts else weights


def number_in(text: Any) -> Any:
    """A number written as text, since safetensors holds only texts; anything else as it is."""
    for kind in (int, float):
        try:
            return kind(text) if isinstance(text, str) and len(text) < 40 else text
        except ValueError:
            continue
    return text
