"""Files and folders, on a disk or in an object store, behind the part of ``pathlib.Path`` that this package uses."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any

from ldm_ray.settings.errors import ConfigError, DataError

REMOTE_S = 3.0


class RemotePath:
    """A name in a store that pyarrow opens: s3://, gs://, abfs:// and others; a query of the URI stays with it.

    There are no folders, only names that begin alike. A file appears with all of its bytes or not at all.
    Credentials are those of the environment. Raises ConfigError when pyarrow does not know the URI; later
    FileNotFoundError where pathlib does, and DataError on whatever else the store refuses.
    """

    def __init__(self, uri: str, store: Any = None, parts: tuple[str, ...] = ()) -> None:
        from ldm_ray.files.store import Store  # pyarrow is only imported where there is a store

        self.uri, self.store, self.parts = uri, store or Store(uri), parts

    def __reduce__(self) -> tuple[Any, ...]:
        return RemotePath, (str(self),)

    def __str__(self) -> str:
        base, mark, query = self.uri.partition("?")
        return "/".join((base.rstrip("/"), *self.parts)) + mark + query

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: RemotePath) -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.uri, self.store, (*self.parts, *PurePosixPath(name).parts))

    def joinpath(self, name: str) -> RemotePath:
        return self / name

    @property
    def key(self) -> str:
        """The name in the store."""
        return "/".join(self.parts)

    @property
    def filesystem(self) -> Any:
        """pyarrow's, which knows the name as ``place``."""
        return self.store.fs

    @property
    def place(self) -> str:
        return self.store.path(self.key)

    @property
    def name(self) -> str:
        return self.parts[-1] if self.parts else self.store.root.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        if self.parts:
            return RemotePath(self.uri, self.store, self.parts[:-1])
        base, mark, query = self.uri.partition("?")
        return RemotePath(base.rstrip("/").rpartition("/")[0] + mark + query)

    def absolute(self) -> RemotePath:
        return self

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a folder appears with its first file. FileExistsError as for a folder."""
        if not exist_ok and self.store.sizes(self.key):
            raise FileExistsError(f"{self} is there already")

    def _asked(self, ask: Callable[[str], Any]) -> Any:
        """What the store says of the name. FileNotFoundError, else DataError in one line."""
        try:
            return ask(self.key)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DataError(f"{self} cannot be read: {' '.join(str(error).split())[:200]}") from None

    def _info(self) -> Any:
        return self._asked(self.store.info)

    def exists(self) -> bool:
        return self._info().type.name != "NotFound"

    def is_file(self) -> bool:
        return self._info().is_file

    def is_dir(self) -> bool:
        return self._info().type.name == "Directory"

    def stat(self) -> SimpleNamespace:
        """``st_size``, ``st_mtime`` and ``st_mtime_ns``. FileNotFoundError when it is not there."""
        info = self._info()
        if info.type.name == "NotFound":
            raise FileNotFoundError(f"{self} is not there")
        changed = info.mtime_ns or 0
        return SimpleNamespace(st_size=info.size or 0, st_mtime=changed / 1e9, st_mtime_ns=changed)

    def read_bytes(self) -> bytes:
        return self._asked(self.store.read)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def open(self, mode: str) -> io.BytesIO:
        """The whole file in memory, to be read."""
        if mode != "rb":
            raise ValueError(f"a file of an object store is opened as 'rb', not {mode!r}")
        return io.BytesIO(self.read_bytes())

    def write_bytes(self, data: bytes) -> None:
        self.store.write(self.key, data)

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def touch(self) -> None:
        self.write_bytes(b"")

    def unlink(self, missing_ok: bool = False) -> None:
        if missing_ok and not self.exists():
            return
        self._asked(self.store.remove)

    def iterdir(self) -> Iterator[RemotePath]:
        for name in sorted(self.store.sizes(self.key)):
            yield RemotePath(self.uri, self.store, PurePosixPath(name).parts)

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Files (no folders) as many levels down as the pattern has parts, by its wildcards."""
        depth = len(self.parts) + len(PurePosixPath(pattern).parts)
        return (path for path in self.rglob(pattern) if len(path.parts) == depth)

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        for name, size in sorted(self.store.sizes(self.key, recursive=True).items()):
            if size >= 0 and PurePosixPath(name).match(pattern):
                yield RemotePath(self.uri, self.store, PurePosixPath(name).parts)


AnyPath = Path | RemotePath


def to_path(place: str | os.PathLike[str] | RemotePath) -> AnyPath:
    """A path, or a name in an object store where there is a ``://``. ConfigError: pyarrow cannot open it."""
    if isinstance(place, RemotePath) or "://" in str(place):
        return place if isinstance(place, RemotePath) else RemotePath(str(place))
    return local_path(place)


def local_path(place: str | os.PathLike[str]) -> Path:
    """A path on a disk, ``~`` expanded. ConfigError on what can be no path: an unknown home, a null character."""
    try:
        if b"\0" in os.fsencode(place):
            raise ValueError
        return Path(place).expanduser()
    except RuntimeError:
        raise ConfigError(f"{place}: the home folder of that user is not known here; write the whole path") from None
    except ValueError:
        raise ConfigError(f"{os.fspath(place)!r} can be no path: it holds a character that no file name has") from None


@contextlib.contextmanager
def naming(path: AnyPath, partial: Path | None = None) -> Iterator[None]:
    """An OSError within that names no file, as that of a full disk, or the partial one, names the path."""
    try:
        yield
    except OSError as error:
        if error.filename is None or error.filename == str(partial):
            error.filename = str(path)
        raise


def look_every(path: AnyPath, on_disk: float) -> float:
    """Seconds between looks at a file that another process may write: as given on a disk, more in an object store."""
    return REMOTE_S if isinstance(path, RemotePath) else on_disk


def unique() -> str:
    """A part of a name that no other process on any machine takes."""
    return uuid.uuid4().hex[:16]


def write_bytes(path: AnyPath, data: bytes | memoryview, durable: bool = False) -> None:
    """Writes a file at once or not at all: under a temporary name on a disk, whose name is changed then.

    durable: the bytes are on the disk before the name is.
    """
    if isinstance(path, RemotePath):
        path.write_bytes(bytes(data))
        return
    with replaced(path, durable) as stream:
        stream.write(data)


@contextlib.contextmanager
def replaced(path: Path, durable: bool = False, partial: Path | None = None) -> Iterator[IO[bytes]]:
    """A stream that becomes the file on a disk when all of it was written. OSError names the file.

    durable: the bytes are on the disk before the name is, and the name is at the end. partial: the file until then,
    on the same disk.
    """
    partial = partial or path.with_name(f".{path.name}.partial-{unique()}")
    with naming(path, partial):
        for folder in path.parent, partial.parent:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as stream:
                yield stream
                if durable:
                    stream.flush()
                    os.fsync(stream.fileno())
            partial.replace(path)
            if durable:
                sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """The names in it are on the disk, where the disk can say so."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def folder_at_once(folder: AnyPath, last: str) -> Iterator[AnyPath]:
    """A new folder beside ``folder``, to be filled within, that takes its place at the end.

    last: the file that makes a folder complete. One that is complete by then stays, since others may be reading it.
    In an object store the folder itself is filled: each file appears there at once.
    """
    if isinstance(folder, RemotePath):
        yield folder
        return
    beside = folder.with_name(f".{folder.name}.partial-{unique()}")
    beside.mkdir(parents=True)
    try:
        yield beside
        if (folder / last).exists():
            return
        try:
            beside.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            for file in sorted(beside.iterdir(), key=lambda file: file.name == last):  # into an unfinished folder
                file.replace(folder / file.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def append_line(path: AnyPath, line: str) -> None:
    """Adds a line, or nothing, to a file that nobody else writes; one in an object store is written again."""
    if isinstance(path, RemotePath):
        path.write_text((path.read_text() if path.exists() else "") + line + "\n")
        return
    with naming(path), path.open("ab", buffering=0) as stream:
        end, data = stream.tell(), line.encode() + b"\n"
        try:
            if stream.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            stream.truncate(end)  # no half line
            raise


class Mirror:
    """``local`` is the folder itself; of one in an object store, a temporary one whose files ``send`` copies there."""

    def __init__(self, folder: AnyPath) -> None:
        self.folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if isinstance(folder, Path):
            self.local = folder
        else:
            self._temporary = tempfile.TemporaryDirectory()
            self.local = Path(self._temporary.name)

    def fetch(self, name: str) -> Path:
        """The local file of a name, with what the folder has by that name."""
        file = self.local / name
        if self._temporary and (self.folder / name).exists():
            file.write_bytes((self.folder / name).read_bytes())
        return file

    def send(self) -> None:
        if self._temporary:
            for file in self.local.iterdir():
                write_bytes(self.folder / file.name, file.read_bytes())

    def close(self) -> None:
        self.send()
        if self._temporary:
            self._temporary.cleanup()


def outdir(place: str | None) -> AnyPath:
    """The output directory, absolute or in an object store: as given, else $SCRATCH, else ./outputs."""
    return to_path(place or os.environ.get("SCRATCH") or "outputs").absolute()


def cache_dir(place: str | None) -> Path:
    """The absolute cache directory: as given, else $SLURM_TMPDIR, else ./hf_cache."""
    return local_path(place or os.environ.get("SLURM_TMPDIR") or "hf_cache").absolute()
