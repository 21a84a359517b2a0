"""Tensors of an untrusted file, which are only read when they are asked for."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from ldm_ray.settings.errors import CheckpointError
from ldm_ray.terminal.text import shown

MAX_DIMS = 16
MAX_SIZE = 2**40
DTYPES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Source:
    """An open file of a known size, of which no more than ``budget`` bytes are read as tensors."""

    def __init__(self, file: IO[bytes], size: int, budget: int) -> None:
        self.file, self.size, self.budget = file, size, budget

    def bytes_at(self, start: int, count: int) -> bytes:
        """ValueError where the file has fewer."""
        if start < 0 or count < 0 or start + count > self.size:
            raise ValueError("it ends before what it announces")
        self.file.seek(start)
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError("it ends before what it announces")
        return data

    def fill(self, buffer: Tensor, start: int) -> None:
        """Reads into a uint8 buffer (N,)."""
        self.budget -= len(buffer)
        if self.budget < 0:
            raise CheckpointError("holds more numbers than are read of a file of its kind")
        if start + len(buffer) > self.size:
            raise CheckpointError("ends before what it announces")
        self.file.seek(start)
        array: Any = buffer.numpy()
        view, filled = memoryview(array), 0
        while filled < len(buffer):
            count = self.file.readinto(view[filled:])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError("ends before what it announces")
            filled += count

    def sha256(self) -> str:
        """Of the whole file, as it was opened, whatever its name stands for by now."""
        digest = hashlib.sha256()
        self.file.seek(0)
        while chunk := self.file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


@dataclass(frozen=True)
class Storage:
    """``nbytes`` bytes of a file from ``start``, or those in memory, as numbers of a dtype."""

    dtype: torch.dtype
    nbytes: int
    source: Source | None = None
    start: int = 0
    data: bytes = b""


@dataclass(eq=False)
class Stored:
    """A tensor that has not been read: its type, its shape and where its numbers are. ``problem`` says why it cannot
    be read, where that is known."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: Storage
    problem: str = ""

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self) -> Tensor:
        """The tensor, in memory of its own. CheckpointError without the file's name."""
        if self.problem:
            raise CheckpointError(self.problem)
        count = self.numel()
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        item = self.dtype.itemsize
        extent = 1 + sum((side - 1) * step for side, step in zip(self.shape, self.stride, strict=True))
        buffer = torch.empty(extent * item, dtype=torch.uint8)
        if self.storage.source:
            self.storage.source.fill(buffer, self.storage.start + self.offset * item)
        else:
            data = self.storage.data[self.offset * item : (self.offset + extent) * item]
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return buffer.view(self.dtype).as_strided(self.shape, self.stride)

    def item(self) -> Any:
        """The number of a tensor that holds one."""
        return self.read().reshape(()).item()

    def __str__(self) -> str:
        return f"a tensor of shape {shape_text(self.shape)}, {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Unread:
    """Something that is there and is of no use here."""

    what: str

    def __str__(self) -> str:
        return self.what


def shape_text(shape: tuple[int, ...]) -> str:
    return "×".join(shown(side) for side in shape) or "()"


def stored(storage: Any, offset: Any, shape: Any, stride: Any, dtype: torch.dtype | None = None) -> Stored | Unread:
    """A tensor as a file describes it. ValueError when that cannot be; a claim to more numbers than the storage holds
    is the tensor's ``problem``."""
    if isinstance(storage, Unread):
        return storage
    if not isinstance(storage, Storage):
        raise ValueError("a tensor is without a storage")
    kind = dtype or storage.dtype
    sides, steps = numbers(shape), numbers(stride)
    if len(sides) != len(steps) or len(sides) > MAX_DIMS or not whole(offset):
        raise ValueError("a tensor has an impossible shape")
    extent = 1 + sum((side - 1) * step for side, step in zip(sides, steps, strict=True)) if math.prod(sides) else 0
    problem, item = "", kind.itemsize
    if max((offset + extent) * item, math.prod(sides) * item) > storage.nbytes:
        problem = "claims more than its storage holds"
    return Stored(kind, sides, steps, offset, storage, problem)


def contiguous(storage: Storage, shape: Any, dtype: torch.dtype | None = None, fortran: bool = False) -> Stored:
    """A tensor row by row, or column by column."""
    sides = numbers(shape)
    order = sides if fortran else sides[::-1]
    steps = [math.prod(order[:i]) for i in range(len(order))]
    tensor = stored(storage, 0, sides, steps if fortran else steps[::-1], dtype)
    assert isinstance(tensor, Stored)
    return tensor


def numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or len(value) > MAX_DIMS or not all(whole(each) for each in value):
        raise ValueError("a tensor has an impossible shape")
    return tuple(value)


def whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_SIZE
