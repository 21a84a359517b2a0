"""The project's commands, as processes of their own and within the tests' process."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import psutil

from ldm_ray.terminal import cli

T = TypeVar("T")
SEARCH = "tune.search"  # which is no module of the package
STARTED: list[subprocess.Popen[str]] = []


def call(module: str, *flags: object) -> tuple[int, str, str]:
    """A command to its end in this process, on the Ray that this process has: (exit code, stdout, stderr).

    For all that does not depend on a process of its own: a start of Python, PyTorch and Ray takes 8 s.
    """
    command = importlib.import_module(module if module == SEARCH else f"ldm_ray.{module}")
    output, errors = io.StringIO(), io.StringIO()
    handler, root = logging.StreamHandler(errors), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            cli.run(lambda: command.main([str(flag) for flag in flags]), command.PROG)
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code, output.getvalue(), errors.getvalue()
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    raise AssertionError("a command ends with SystemExit")


def run(module: str, *flags: object, code: int = 0) -> str:
    """The same; what it printed, with the exit code that is expected."""
    actual, output, errors = call(module, *flags)
    assert actual == code, f"exit code {actual}, expected {code}:\n{output}{errors}"
    return output + errors


def refusal(module: str, *flags: object) -> str:
    """The one line with which a command refuses a user's mistake."""
    code, output, errors = call(module, *flags)
    assert (code, output, errors.count("\n")) == (2, "", 1), f"exit code {code}, expected 2 and one line:\n{errors}"
    return errors


def start(*arguments: object, under: Sequence[str] = (), **settings: Any) -> subprocess.Popen[str]:
    """A Python of its own: ``start("-m", "ldm_ray.train", …)``. Standard error goes where standard output goes.

    under: a command, with its flags, that runs it. It is ended with the test, together with all that it started.
    """
    command = [*under, sys.executable, *map(str, arguments)]
    settings["env"] = dict(os.environ) | settings.pop("env", {})
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | settings
    process = subprocess.Popen(command, text=True, **settings)
    STARTED.append(process)
    return process


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What the process printed, once it has ended with the code."""
    output = process.communicate(timeout=400)[0]
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}:\n{output}"
    return output


def wait_for(condition: Callable[[], T], process: subprocess.Popen[str], seconds: float = 400) -> T:
    """The condition's first value that is true, while the process runs."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None, f"the process ended with {process.returncode}:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.02)
    return value


@contextlib.contextmanager
def meanwhile(condition: Callable[[], T], action: Callable[[T], object]) -> Iterator[None]:
    """Does something to a command that runs within, in this process, once a condition has a value that is true."""
    over = threading.Event()

    def watch() -> None:
        while not (value := condition()):
            assert not over.wait(0.02), "the command ended before anything was done to it"
        action(value)

    with ThreadPoolExecutor(1) as beside:
        watched = beside.submit(watch)
        try:
            yield
        finally:
            over.set()
        watched.result()


def below(process: psutil.Process, title: str) -> list[psutil.Process]:
    """The processes that a process started, and those that they did, whose title (of Ray's workers) holds the text."""
    processes = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(child.cmdline()[:1]):
                processes.append(child)
    return processes


def kill(process: psutil.Process) -> None:
    """A process and all that it started."""
    with contextlib.suppress(psutil.Error):
        children = process.children(recursive=True)
        for each in (process, *children):
            with contextlib.suppress(psutil.Error):
                each.kill()


@contextlib.contextmanager
def none_left() -> Iterator[None]:
    """Ends what was started within and still runs."""
    del STARTED[:]
    try:
        yield
    finally:
        for process in STARTED:
            if process.poll() is None:
                kill(psutil.Process(process.pid))
                process.wait()
            for stream in (process.stdout, process.stderr):
                if stream:
                    stream.close()
        del STARTED[:]


def only(folder: Path, pattern: str) -> Path:
    """The one file of the pattern."""
    paths = list(folder.glob(pattern))
    assert len(paths) == 1, f"{pattern} under {folder}: expected one, got {[path.name for path in paths]}"
    return paths[0]
