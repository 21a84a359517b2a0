"""What asks a command to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
AGAIN_S = 1.0  # `timeout`, a shell's `kill -- -PGID` and others send the same wish twice


@contextlib.contextmanager
def on_first(stop: Callable[[int], None]) -> Iterator[None]:
    """Calls stop with the number of the first SIGINT, SIGTERM or SIGUSR1 that comes within; later ones do nothing.

    But a SIGINT that comes more than a second after the first ends the process at once, with 130. Without effect
    outside the main thread, which is the only one that has handlers.
    """
    first: list[float] = []

    def handle(number: int, _: Any) -> None:
        if not first:
            first.append(time.monotonic())
            stop(number)
        elif number == signal.SIGINT and time.monotonic() - first[0] > AGAIN_S:
            os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
