"""Fixed-size tiles: the reason why an image's bytes do not depend on what else is made with it.

A matrix product may sum in another order when the number of rows or threads changes. So images are computed in tiles
of a few fixed sizes, filled up where images are missing, each by one thread however many cores there are. A size
below the largest is used only if a check on this machine shows that it gives the bits of the largest.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Sizes = dict[str, tuple[int, ...]]
SIZES: Sizes = {"cpu": (4, 8, 16, 32, 64, 128, 256), "mps": (16, 64, 256), "cuda": (64, 1024)}
PIXEL_SIZES: Sizes = {"cpu": (1, 2, 4, 8, 16, 32), "mps": (4, 16, 64), "cuda": (16, 128, 1024)}  # a U-Net's
ROOM = 2**24  # the most numbers in a layer's output for one tile, on a CPU
WHOLE, PIXEL_WHOLE = 8, 1  # so few images are faster in one tile than divided among threads
A = TypeVar("A")
R = TypeVar("R")
Compute = Callable[[Tensor, Tensor, Tensor], list[Tensor]]


def within_room(sizes: Sizes, numbers: int) -> Sizes:
    """The sizes whose tiles fit in memory when an image takes so many numbers; 28×28 pixels fit in all of them."""
    return sizes | {"cpu": tuple(size for i, size in enumerate(sizes["cpu"]) if not i or size * numbers <= ROOM)}


class Tiles:
    """Work in tiles. compute(latents (n, D), t (n,) int64, labels (n,) int64) → tensors (n, …) is everything whose
    bits could depend on n; sizes are checked with it."""

    def __init__(
        self, compute: Compute, dim: int, device: torch.device, sizes: Sizes = SIZES, whole: int = WHOLE
    ) -> None:
        self.compute, self.dim, self.device, self.whole = compute, dim, device, whole
        self.sizes = sizes[device.type]
        self.threads = torch.get_num_threads() if device.type == "cpu" else 1
        self.pool = ThreadPoolExecutor(self.threads, "tile", initializer=torch.set_num_threads, initargs=(1,))
        self._wanted: list[Tensor] = []
        self._equal = {self.sizes[-1]: True}
        self._lock = threading.Lock()

    def size_for(self, count: int) -> int:
        """The size of tile for so many images: the smallest with which every thread gets one tile at most, and with
        which ``whole`` images or fewer stay in one tile."""
        share = max(-(-count // self.threads), min(count, self.whole))
        return next((size for size in self.sizes if size >= share and self.is_equal(size)), self.sizes[-1])

    def is_equal(self, size: int) -> bool:
        """Whether tiles of this size give the bits of the largest; checked at the first call."""
        with self._lock:
            if size not in self._equal:
                self._equal[size] = self.map(self._compare, [size])[0]
            return self._equal[size]

    def map(self, work: Callable[[A], R], items: Iterable[A]) -> list[R]:
        """Results of work on every item, in order; each thread works on one item at a time."""
        with single_threaded():
            return list(self.pool.map(work, items))

    @torch.inference_mode()
    def _compare(self, size: int) -> bool:
        largest = self.sizes[-1]
        latents = torch.randn(largest, self.dim, generator=torch.Generator().manual_seed(0)).to(self.device)
        labels = torch.arange(largest, device=self.device) % 2
        t = torch.ones(1, dtype=torch.int64, device=self.device)
        self._wanted = self._wanted or self.compute(latents, t.expand(largest), labels)
        for start in {0, (largest - size) // 2, largest - size}:
            rows = slice(start, start + size)
            tensors = self.compute(latents[rows].clone(), t.expand(size), labels[rows].clone())
            if not all(torch.equal(part, whole[rows]) for part, whole in zip(tensors, self._wanted, strict=True)):
                return False
        return True


_lock = threading.Lock()
_inside = 0
_threads_before = 1


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Inside, PyTorch and its matrix library use one thread per call. The setting is the whole process's; the last to
    leave restores it."""
    global _inside, _threads_before
    with _lock:
        if _inside == 0:
            _threads_before = torch.get_num_threads()
            torch.set_num_threads(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                torch.set_num_threads(_threads_before)
