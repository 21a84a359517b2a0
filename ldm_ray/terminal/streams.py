"""Standard streams that never end a command: closed, broken and full ones, and terminals of ASCII alone."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stream(io.FileIO):
    """A standard stream's bytes. From the first that cannot be written on, they go nowhere; ``failure`` says why."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # a pipe that does not block and is full
                select.select([], [self], [])
            return written
        except OSError as error:
            self.failure = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # native code that prints is spared as well
            os.close(nowhere)
            return memoryview(data).nbytes


def prepare() -> None:
    """Makes the process's standard streams such that no print raises; streams that a caller put there stay.

    A closed one is opened to nowhere, so that no file of the command takes its number. What an encoding does not have
    is printed as an escape.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        before = getattr(sys, name)
        if before is getattr(sys, f"__{name}__"):
            stream = lasting(before)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def lasting(before: Any) -> io.TextIOWrapper:
    """The stream that writes where the one before does; None, what Python has for a closed one, to nowhere."""
    if before is None:
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    with contextlib.suppress(OSError):
        before.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(Stream(before.fileno(), "w", closefd=False)),
        before.encoding,
        errors="backslashreplace",
        line_buffering=before.line_buffering,
        write_through=before.write_through,
    )


def full() -> OSError | None:
    """The error when standard output was cut short by a full disk. A reader that left is no error."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.failure if isinstance(raw, Stream) else None
    return error if error and error.errno in FULL else None
