"""Word of work that takes more than a moment: a line that moves on a terminal, else a line now and then."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
from collections.abc import Sized
from types import TracebackType

FIRST_S, EVERY_S = 2.0, 5.0  # seconds to the first line where there is no terminal, and between lines
TICK_S = 0.25  # between two looks of the line on a terminal
log = logging.getLogger(__name__)


class Progress:
    """Within it, what is done is shown on standard error: how much of ``total``, or for how long.

    One inside another, in any thread, is not shown. Work that is over within two seconds leaves no trace where there
    is no terminal.
    """

    _shown: Progress | None = None

    def __init__(self, what: str, total: int = 0) -> None:
        self.what, self.total, self.done = what, total, 0
        self.over = threading.Event()
        self.thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        self.began = time.monotonic()
        if Progress._shown is None:
            Progress._shown = self
            work = self.draw if sys.stderr.isatty() else self.tell
            self.thread = threading.Thread(target=work, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.thread:
            self.over.set()
            self.thread.join()
            Progress._shown = None

    def advance(self, count: int = 1) -> None:
        self.done += count

    def watch(self, first: int, step: int, x0: Sized) -> None:
        """A generator's ``watch``: each step of each image counts."""
        self.advance(len(x0))

    def text(self) -> str:
        """What is done, how much of it, and the time left where that is known."""
        elapsed = time.monotonic() - self.began
        if not self.total:
            return f"{self.what}: {elapsed:.0f} s"
        left = f", {elapsed * (self.total - self.done) / self.done:.0f} s left" if self.done else ""
        return f"{self.what}: {100 * self.done // self.total} %{left}"

    def tell(self) -> None:
        """A line after two seconds, and from time to time."""
        wait = FIRST_S
        while not self.over.wait(wait):
            log.info("%s", self.text())
            wait = EVERY_S

    def draw(self) -> None:
        """One line that is written over again, and goes in the end."""
        stream = sys.stderr
        while True:
            width = shutil.get_terminal_size().columns - 1
            print("\r\033[K" + self.text()[:width], end="", file=stream, flush=True)
            if self.over.wait(TICK_S):
                break
        print("\r\033[K", end="", file=stream, flush=True)
