"""A folder on any filesystem that pyarrow opens. A file appears with all of its bytes or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from pyarrow import fs

from ldm_ray.files.paths import local_path, replaced, unique
from ldm_ray.settings.errors import ConfigError, DataError

PARTIAL = ".partial"
PUT = ("s3", "gcs", "abfs", "py::")  # an object is seen when its upload is complete


class Store:
    """Files by their names under one folder, which is a path or a URI."""

    def __init__(self, where: str) -> None:
        self.where = where if "://" in where else str(local_path(where).absolute())
        try:
            self.fs, root = fs.FileSystem.from_uri(where) if "://" in where else (fs.LocalFileSystem(), self.where)
        except (pa.ArrowException, OSError, ValueError, ImportError) as error:
            raise ConfigError(f"{where} cannot be opened by pyarrow: {first_line(error)}") from None
        self.root: str = root.rstrip("/")
        self.is_local = isinstance(self.fs, fs.LocalFileSystem)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.where,)

    def __str__(self) -> str:
        return self.where

    def path(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")

    def write(self, name: str, data: bytes, durable: bool = True) -> None:
        """Writes a file, or replaces it, at once. DataError in one line when it cannot be done.

        durable: on a local disk, the bytes are on it before the name is.
        """
        try:
            if self.is_local or self.fs.type_name.startswith(PUT):
                with self.replaced(name, durable) as stream:
                    stream.write(data)
            else:
                partial = f"{PARTIAL}/{unique()}"
                for needed in (partial, name):
                    self.fs.create_dir(self.path(needed).rpartition("/")[0], recursive=True)
                with self.replaced(partial) as stream:
                    stream.write(data)
                self.fs.move(self.path(partial), self.path(name))
        except OSError as error:
            raise DataError(f"{self}/{name} cannot be written: {first_line(error)}") from None

    @contextlib.contextmanager
    def replaced(self, name: str, durable: bool = True) -> Iterator[IO[bytes]]:
        """A stream that becomes the file when all of it was written: on a disk, and in a store that ``PUT`` names."""
        if not self.is_local:
            with self.fs.open_output_stream(self.path(name)) as stream:
                yield stream
            return
        partial = Path(self.path(PARTIAL)) / unique()
        with replaced(Path(self.path(name)), durable, partial) as stream:
            yield stream

    def read(self, name: str) -> bytes:
        """A whole file. FileNotFoundError, or another OSError."""
        with self.fs.open_input_stream(self.path(name), compression=None) as stream:
            return stream.read()

    def info(self, name: str) -> fs.FileInfo:
        """Type, size and time of a file; the type NotFound where there is none. OSError when it cannot be known."""
        return self.fs.get_file_info(self.path(name))

    def remove(self, name: str) -> None:
        """FileNotFoundError, or another OSError."""
        self.fs.delete_file(self.path(name))

    def sizes(self, folder: str = "", recursive: bool = False) -> dict[str, int]:
        """Bytes of each entry of a folder by its name under the root; −1 for a folder. Empty without the folder."""
        selector = fs.FileSelector(self.path(folder), allow_not_found=True, recursive=recursive)
        try:
            files = self.fs.get_file_info(selector)
        except OSError as error:
            raise DataError(f"{self} cannot be read: {first_line(error)}") from None
        return {
            info.path[len(self.root) :].lstrip("/"): info.size if info.type == fs.FileType.File else -1
            for info in files
        }

    def clean(self) -> None:
        """Removes the unfinished files of writers that were killed."""
        if self.fs.get_file_info(self.path(PARTIAL)).type == fs.FileType.Directory:
            self.fs.delete_dir(self.path(PARTIAL))


def first_line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
