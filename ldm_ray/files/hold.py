"""Folders that one command at a time works in, and names that no two commands take."""

from __future__ import annotations

import calendar
import contextlib
import fcntl
import logging
import os
import random
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ldm_ray.files.paths import AnyPath, write_bytes
from ldm_ray.settings.errors import ConfigError

NAME = ".held"
RENEW_S = 4.0  # a lease is written again so often,
LAPSE_S = 15.0  # and counts for nothing once that has not happened for so long
log = logging.getLogger(__name__)
STAMP = "%Y%m%d-%H%M%S"


class Held(ConfigError):
    """Another command works in the folder; the message says which."""


@contextlib.contextmanager
def hold(folder: AnyPath) -> Iterator[None]:
    """Keeps other commands out of a folder, which is created where it is missing, for as long as this one lives.

    On a disk by a lock of the kernel's, which ends with the process however that ends. In an object store, and on
    disks without locks, by a lease: a file that is renewed all the time. Raises Held, or ConfigError where nothing
    can be written.
    """
    created = not folder.exists()
    try:
        lock = _lock(folder) if isinstance(folder, Path) else None
        lease = None if lock else Lease(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        if lock:
            (folder / NAME).unlink(missing_ok=True)
            lock.close()
        if lease:
            lease.end()
        if created:
            remove_empty(folder)


def remove_empty(folder: AnyPath) -> None:
    """Removes a folder into which nothing was written."""
    if isinstance(folder, Path):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _lock(folder: Path) -> IO[str] | None:
    """The open file whose lock this process has; None where the disk has no locks. Held."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / NAME).open("a+")
        except FileNotFoundError:  # the folder was removed just now
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(file.fileno()), (folder / NAME).stat())
        except BlockingIOError:
            with file:
                raise Held(refusal(folder, _holder(file))) from None
        except FileNotFoundError:  # its holder ended in between, and took the file away
            mine = False
        except OSError:
            file.close()
            return None
        if mine:
            with contextlib.suppress(OSError):  # a full disk: the lock counts all the same
                file.truncate(0)
                file.write(this_command())
                file.flush()
            return file
        file.close()


def _holder(file: IO[str]) -> str:
    """Who wrote the file, which it does just after it has the lock."""
    for _ in range(20):
        file.seek(0)
        if text := file.read(300).strip():
            return text
        time.sleep(0.05)
    return ""


def refusal(folder: AnyPath, holder: str) -> str:
    return f"{folder} is in use by {holder or 'another command'}; wait until it ends"


def this_command() -> str:
    """This process as another one tells its user."""
    name, now = Path(sys.argv[0]).stem or "python", time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    return f"process {os.getpid()} on {socket.gethostname()} ({name}, since {now} UTC)"


class Lease:
    """A file in the folder with a number that rises. Whoever sees only its own after writing it has the folder."""

    def __init__(self, folder: AnyPath) -> None:
        """Raises Held once another one is seen to be renewed, which takes ``RENEW_S``."""
        self.folder, self.file, self.number = folder, folder / f"{NAME}-{uuid.uuid4().hex}", 0
        while True:
            self._await_others()
            self._renew()
            if not self._others():
                break
            self.file.unlink(missing_ok=True)  # two came together: both step back
            time.sleep(random.uniform(0, 1))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _others(self) -> dict[AnyPath, bytes]:
        others = {}
        for file in self.folder.iterdir() if self.folder.exists() else ():
            if file.name.startswith(f"{NAME}-") and file != self.file:
                with contextlib.suppress(FileNotFoundError):
                    others[file] = file.read_bytes()
        return others

    def _await_others(self) -> None:
        """Returns when there are none, or none that is renewed."""
        seen, until = self._others(), time.monotonic() + LAPSE_S
        if seen:
            log.info("%s: looking for up to %.0f s whether another command is at work there", self.folder, LAPSE_S)
        while seen and time.monotonic() < until:
            time.sleep(RENEW_S / 8)
            now = self._others()
            for file in seen.keys() & now.keys():
                if now[file] != seen[file]:
                    who = now[file].decode(errors="replace").partition("\n")[2][:300]
                    raise Held(refusal(self.folder, who))
            seen = {file: seen[file] for file in seen.keys() & now.keys()}
        for file in seen:
            file.unlink(missing_ok=True)

    def _renew(self) -> None:
        self.number += 1
        write_bytes(self.file, f"{self.number}\n{this_command()}".encode())

    def _keep(self) -> None:
        while not self._over.wait(RENEW_S):
            with contextlib.suppress(Exception):  # the store does not answer: the next try may succeed
                self._renew()

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(Exception):
            self.file.unlink(missing_ok=True)


def new_folder(parent: AnyPath, stem: str, held: contextlib.ExitStack) -> AnyPath:
    """A folder ``STEM-YYYYMMDD-HHMMSS`` that this call alone created, held until the stack closes.

    The time is UTC, and later than that of every folder beside it, whatever the clock has been set to since.
    """
    names = [entry.name for entry in parent.iterdir()] if parent.exists() else []
    moment = max([int(time.time()), *(begun + 1 for name in names if (begun := time_in(name)) is not None)])
    while True:
        folder = parent / f"{stem}-{time.strftime(STAMP, time.gmtime(moment))}"
        try:
            folder.mkdir(parents=True)
            held.callback(remove_empty, folder)
            held.enter_context(hold(folder))
        except (FileExistsError, Held):
            moment += 1
        else:
            return folder


def time_in(name: str) -> int | None:
    """The time at the end of a folder's name, in seconds since 1970; None where there is none."""
    match = re.search(r"-(\d{8}-\d{6})$", name, re.ASCII)
    try:
        return calendar.timegm(time.strptime(match[1], STAMP)) if match else None
    except ValueError:
        return None
