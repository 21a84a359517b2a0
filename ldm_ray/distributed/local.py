"""The Ray that a command starts on this machine: deaf to the signals that stop the command, and gone with it.

Ray keeps a folder for every start (its logs and sockets) and removes none. Ours carry a mark, locked as long as the
command lives, by which the next command knows those of commands that were killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from ldm_ray.settings.errors import LdmError

log = logging.getLogger(__name__)
MARK = "ldm_ray.lock"  # in the folder of a start
DEAF_TO = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # and to SIGINT by Ray itself


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Processes started within, and all that they start, do not get the signals that ask a command to stop.

    These often go to everything at once: to the process group (``timeout``, a shell), to the control group (systemd,
    Slurm). Training could not save a checkpoint then.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def removed_unless_started(folder: Path) -> Iterator[None]:
    """Ends what was started within, and removes its session from Ray's folder, where that was interrupted or failed."""
    begun = time.time()
    try:
        yield
    except BaseException:
        ray.shutdown()
        for session in folder.glob(f"session_*_{os.getpid()}"):
            if session.stat().st_mtime >= begun - 1:
                kill(session.resolve())
                shutil.rmtree(session, ignore_errors=True)
        raise


class Session:
    """One start of Ray by this process: its folder and its processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        new = folder / f".{MARK}"
        self.lock = new.open("w")
        with contextlib.suppress(OSError):  # a file system without locks: its sessions are never taken for dead ones
            fcntl.flock(self.lock, fcntl.LOCK_EX)
            new.rename(folder / MARK)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends Ray. Its folder, with the logs, goes at the next command's start after an error that nobody foresaw."""
        from ray._private import worker

        head: Any = worker._global_node
        if head is not None:  # By SIGKILL: they are deaf to SIGTERM, for which Ray would wait a second each
            end_all = head.kill_all_processes
            head.kill_all_processes = lambda **_: end_all(check_alive=False, allow_graceful=False, wait=True)
        ray.shutdown()
        kill(self.folder)
        self.lock.close()
        if kind is None or issubclass(kind, (LdmError, SystemExit, KeyboardInterrupt)):
            shutil.rmtree(self.folder, ignore_errors=True)


def clean(folder: Path) -> None:
    """Removes what commands of this user that were killed have left of their Ray in its folder, processes as well."""
    dead = [mark.parent for mark in folder.resolve().glob(f"session_*/{MARK}") if is_dead(mark)]
    for session in dead:
        kill(session)
        shutil.rmtree(session, ignore_errors=True)
    if dead:
        log.info("removed from %s what earlier commands had left there of their Ray (%d)", folder, len(dead))


def is_dead(mark: Path) -> bool:
    """Whether nobody holds the lock of a mark of this user."""
    try:
        with mark.open() as stream:
            if os.fstat(stream.fileno()).st_uid != os.getuid():
                return False
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False


def kill(folder: Path) -> None:
    """Ends Ray's processes that have files of a session open; without a /proc they end by themselves, in 40 s.

    These are its agents: they wait for an answer of what has ended before them.
    """
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes().startswith(b"ray::") and any(
                os.readlink(file).startswith(f"{folder}/") for file in (process / "fd").iterdir()
            ):
                os.kill(int(process.name), signal.SIGKILL)
