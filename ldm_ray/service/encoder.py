"""From images to bytes without holding anybody up: in threads, a little at a time, within the deadline."""

import asyncio
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

from ldm_ray.service.errors import ApiError

SLICE_S = 0.02  # a thread goes to the next answer after so long
INLINE = 64 * 28 * 28  # pixels up to which a thread would cost more than the encoding
LARGE = 4 * 1024 * 1024  # pixels from which an answer waits for the large ones before it


class Encoder:
    """Threads for all answers of a replica. One is always free of the large answers."""

    def __init__(self) -> None:
        large = max(1, len(os.sched_getaffinity(0)) // 4)
        self.pool = ThreadPoolExecutor(large + 1, "encode")
        self._large = asyncio.Semaphore(large)

    async def encode(self, parts: Iterator[bytes], pixels: int, deadline: float) -> bytes:
        """All parts of an answer of so many pixels, joined. ApiError 408: not before ``deadline``, a
        ``time.monotonic()``. Cancelling it ends it with the part that is being made."""
        if pixels <= INLINE:
            return b"".join(parts)
        async with AsyncExitStack() as stack:
            if pixels > LARGE:
                try:
                    await asyncio.wait_for(self._large.acquire(), deadline - time.monotonic())
                except asyncio.TimeoutError:
                    raise late() from None
                stack.callback(self._large.release)
            done: list[bytes] = []
            while await asyncio.wrap_future(self.pool.submit(advance, parts, done)):
                if time.monotonic() > deadline:
                    raise late()
            return b"".join(done)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def advance(parts: Iterator[bytes], done: list[bytes]) -> bool:
    """Makes parts for a while; whether there may be more."""
    started = time.perf_counter()
    for part in parts:
        done.append(part)
        if time.perf_counter() - started > SLICE_S:
            return True
    return False


def late() -> ApiError:
    return ApiError(408, "the deadline came before the images were encoded: ask for fewer, or for a smaller size")
