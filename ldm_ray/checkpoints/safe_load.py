"""Opening an untrusted file of weights: what it holds as plain data, within bounds, with nothing in it executed."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_ray.checkpoints.untrusted.archives import LEGACY, read_legacy, read_safetensors, read_zip
from ldm_ray.checkpoints.untrusted.signatures import kind_of
from ldm_ray.checkpoints.untrusted.tensors import Source, Stored, Unread, shape_text
from ldm_ray.files.paths import AnyPath
from ldm_ray.settings.diffusion import MAX_PARAMETERS
from ldm_ray.settings.errors import CheckpointError, ConfigError, Foreign, LdmError
from ldm_ray.terminal.text import shown

MAX_FILE = 3 * 2**30
MAX_REMOTE = 2**29  # of a file in an object store, which is read whole
MAX_READ = 4 * MAX_PARAMETERS  # bytes of tensors
MAX_DEPTH = 50
MAX_NODES = 50_000
MAX_TEXT = 4096
MAX_TEXTS = 2**20  # characters of all metadata together


@contextmanager
def naming(path: AnyPath | str) -> Iterator[None]:
    """Puts the file in front of what is said of it: ``is …``, ``has …``, or a sentence of its own."""
    try:
        yield
    except (CheckpointError, ConfigError) as error:
        kind = Foreign if isinstance(error, Foreign) else CheckpointError
        verb = str(error).partition(" ")[0] in ("is", "has", "was", "holds", "ends", "makes", "claims")
        raise kind(f"checkpoint {path}{'' if verb else ':'} {error}") from None


@contextmanager
def opened(path: AnyPath, whole: bool = False) -> Iterator[tuple[dict[str, Any], Source]]:
    """(the dictionary in a file of weights, the open file): tensors are ``Stored`` and can be read until this closes.

    whole: read all of them, and not only those that are sampled with. Raises CheckpointError in one line:
    missing, empty, truncated, of another kind (named), too large, holding a class that is not on the list (named).
    """
    size = size_of(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None
    with file:
        source = Source(file, size, size if whole else MAX_READ)
        content = contents(source, path)
        try:
            yield content, source
        except OSError as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None


def size_of(path: AnyPath) -> int:
    """Bytes of a file that can be a checkpoint."""
    try:
        status: Any = path.stat()
        if isinstance(path, Path) and not stat.S_ISREG(status.st_mode):
            what = "a folder; name a .pt file in it" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise CheckpointError(f"checkpoint {path} is {what}")
        if not isinstance(path, Path) and path.is_dir():
            raise CheckpointError(f"checkpoint {path} is a folder; name a .pt file in it")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"checkpoint {path} does not exist") from None
    except PermissionError:
        raise CheckpointError(f"checkpoint {path} may not be read: check its permissions") from None
    except LdmError:
        raise
    except (OSError, ValueError) as error:  # a loop of links, a name that cannot be
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"checkpoint {shown(str(path), 500)} cannot be read: {reason}") from None
    size = int(status.st_size)
    if size == 0:
        raise CheckpointError(f"checkpoint {path} is empty")
    most = MAX_FILE if isinstance(path, Path) else MAX_REMOTE
    if size > most:
        raise CheckpointError(f"checkpoint {path} has {size / 1e6:,.0f} MB; at most {most / 1e6:,.0f} are read")
    return size


def contents(source: Source, path: AnyPath) -> dict[str, Any]:
    """What an open file holds. CheckpointError in one line."""
    try:
        with naming(path):
            content = layout(source)
    except LdmError:
        raise
    except PermissionError:
        raise CheckpointError(f"checkpoint {path} may not be read: check its permissions") from None
    except Exception as error:  # a damaged file can raise nearly anything
        reason = shown(str(error) or type(error).__name__, 120)
        raise CheckpointError(f"checkpoint {path} is no torch file, or damaged ({reason})") from None
    if not isinstance(content, dict):
        kind = "Tensor" if isinstance(content, Stored) else type(content).__name__
        raise CheckpointError(f"checkpoint {path} holds a {kind}, not a dictionary")
    return content


def layout(source: Source) -> Any:
    start = source.bytes_at(0, min(512, source.size))
    if start[:2] == b"PK":
        return read_zip(source)
    if start.startswith(LEGACY):
        return read_legacy(source)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < source.size:
        return read_safetensors(source)
    what = kind_of(start) or "no torch file, or damaged"
    raise Foreign(f"is {what}" if ":" in what or "," in what else f"is {what}, not a checkpoint")


def with_tensors(value: Any) -> Any:
    """The same with every tensor read. CheckpointError without the file's name."""
    known: dict[int, Any] = {}

    def read(value: Any, depth: int) -> Any:
        if not isinstance(value, (dict, list, tuple, Stored, Unread)):
            return value
        if id(value) in known:
            return known[id(value)]
        if depth > MAX_DEPTH:
            raise CheckpointError("is nested without end")
        if isinstance(value, Stored):
            known[id(value)] = value.read()
        elif isinstance(value, Unread):
            return str(value)
        elif isinstance(value, dict):
            entries: dict[Any, Any] = known.setdefault(id(value), {})
            entries.update({key: read(item, depth + 1) for key, item in value.items()})
        else:
            items = [read(item, depth + 1) for item in value]
            known[id(value)] = items if isinstance(value, list) else tuple(items)
        return known[id(value)]

    return read(value, 0)


class Plain:
    """Metadata as plain data of a bounded size: texts cut and without control characters, keys as texts."""

    def __init__(self) -> None:
        self.nodes, self.texts = 0, 0

    def __call__(self, value: Any, depth: int = 0) -> Any:
        """CheckpointError: nested without end, or too much of it."""
        self.nodes += 1
        if depth > MAX_DEPTH:
            raise CheckpointError("its metadata is nested without end")
        self.count(0)
        if isinstance(value, dict):
            return {self.text(str(key)): self(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self(item, depth + 1) for item in value]
        if isinstance(value, (bool, int, float)) or value is None:
            self.count(8)
            return value
        if isinstance(value, bytes):
            return shown(value)
        if isinstance(value, Stored) and value.numel() == 1 and value.dim() == 0 and not value.problem:
            return value.item()
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Tensor):
            value = Unread(f"a tensor of shape {shape_text(tuple(value.shape))}")
        return self.text(str(value)) if depth else Unread(str(value))

    def text(self, value: str) -> str:
        text = shown(value, MAX_TEXT)
        self.count(len(text))
        return text

    def count(self, size: int) -> None:
        self.texts += size
        if self.texts > MAX_TEXTS or self.nodes > MAX_NODES:
            raise CheckpointError(f"its metadata is more than {MAX_NODES:,} values or {MAX_TEXTS:,} characters")
