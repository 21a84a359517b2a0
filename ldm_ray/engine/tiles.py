"""Fixed-size tiles: the reason why an image's bytes do not depend on what else is made with it.

A matrix product may choose another order of summation for another number of rows or threads. So images are
computed in tiles of a few fixed sizes, filled up where images are missing, each by one thread whatever the number
of cores. A size below the largest is used only where a check on this machine found that its bits are those of
the largest.
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
ROOM = 2**24  # numbers of a layer's output for a whole tile, on a CPU
WHOLE, PIXEL_WHOLE = 8, 1  # images up to which one thread is faster alone
A = TypeVar("A")
R = TypeVar("R")
Compute = Callable[[Tensor, Tensor, Tensor], list[Tensor]]


def within_room(sizes: Sizes, numbers: int) -> Sizes:
    """Without those whose tiles take too much memory at so many numbers an image; 28×28 pixels have room for all."""
    return sizes | {"cpu": tuple(size for i, size in enumerate(sizes["cpu"]) if not i or size * numbers <= ROOM)}


class Tiles:
    """compute(latents (n, D), t (n,) int64, labels (n,) int64) → tensors (n, …): all work whose bits could
    depend on n."""

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
        """Images per tile for so many images: the smallest size that gives no thread a second tile, and divides no
        more than are worth dividing."""
        share = max(-(-count // self.threads), min(count, self.whole))
        return next((size for size in self.sizes if size >= share and self.is_equal(size)), self.sizes[-1])

    def is_equal(self, size: int) -> bool:
        """Whether tiles of this size give the bits of the largest; found out when first asked."""
        with self._lock:
            if size not in self._equal:
                self._equal[size] = self.map(self._compare, [size])[0]
            return self._equal[size]

    def map(self, work: Callable[[A], R], items: Iterable[A]) -> list[R]:
        """work on every item, as many at a time as there are threads; results in order."""
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
            found = self.compute(latents[rows].clone(), t.expand(size), labels[rows].clone())
            if not all(torch.equal(made, wanted[rows]) for made, wanted in zip(found, self._wanted, strict=True)):
                return False
        return True


_lock = threading.Lock()
_inside = 0
_threads_before = 1


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """PyTorch and the matrix library under it, whose setting is the whole process's, use one thread per call
    inside; the last to leave restores what was before."""
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
