"""A test run's own temporary folder, and what is done when the run ends: nothing of it stays."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import psutil
import pytest

RUN = "LDM_RAY_TEST_RUN"  # of the environment of every process of the run; its value is the folder
GRACE_S = 40  # Ray's own processes notice within 30 s that a command was killed


def begin(config: pytest.Config) -> None:
    """The environment of this process and of all that it starts: one new folder for what is temporary, one thread."""
    if RUN in os.environ:  # a worker of pytest-xdist
        return
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a shell's background job; its children inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = tempfile.mkdtemp(prefix="ldm")
    Path(folder).chmod(0o755)  # munged wants its socket to be within reach of all
    os.environ |= {RUN: folder, "TMPDIR": folder, "RAY_TMPDIR": folder}
    os.environ["REPORTER_UPDATE_INTERVAL_MS"] = "60000"  # Ray's statistics of its processes, which nobody reads here
    os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other where tests share the cores take minutes
    tempfile.tempdir = None
    config.add_cleanup(lambda: end(folder))


def end(folder: str) -> None:
    """Waits for what is on its way out, ends the rest and names it; removes the folder."""
    deadline = time.monotonic() + GRACE_S
    while (left := of_run(folder)) and time.monotonic() < deadline:
        time.sleep(0.5)
    for process in left:
        with contextlib.suppress(psutil.Error):
            print(f"left by the tests, ended now: {process.pid} {' '.join(process.cmdline())[:150]}")
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)
    for name in (RUN, "TMPDIR", "RAY_TMPDIR"):
        os.environ.pop(name, None)


def of_run(folder: str) -> list[psutil.Process]:
    """Processes of the run beside this one, those above it, and the one of multiprocessing that ends with it."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            tracker = process.ppid() == os.getpid() and "resource_tracker" in process.cmdline()[-1]
            if process.pid not in own and not tracker and process.environ().get(RUN) == folder:
                processes.append(process)
    return processes
