"""Reading an untrusted ``torch.save`` file: nothing in it is ever executed."""

from __future__ import annotations

import argparse
import io
import pathlib
import pickle
import re
import zipfile
from typing import Any

import torch
from torch import Tensor

from ldm_ray.errors import CheckpointError, LdmError
from ldm_ray.paths import AnyPath

_PATHS = {"PosixPath", "WindowsPath", "Path", "PurePosixPath", "PureWindowsPath", "PurePath"}
# Concrete Windows paths cannot be made elsewhere, and a path in a file is only ever text: all become pure ones.
HARMLESS: list[Any] = [argparse.Namespace] + [
    (pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath, f"{module}.{name}")
    for module in ("pathlib", "pathlib._local")
    for name in sorted(_PATHS)
]


def read_torch_file(path: AnyPath) -> dict[str, Any]:
    """The dictionary in a torch file, tensors on the CPU, prefixes untouched.

    Raises CheckpointError in one line: missing, empty, truncated, not a torch file, compressed, holding a
    class outside the allow-list (named), not a dictionary.
    """
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if path.is_dir():
        raise CheckpointError(f"checkpoint {path} is a folder; name a .pt file in it")
    if path.stat().st_size == 0:
        raise CheckpointError(f"checkpoint {path} is empty")
    try:
        source: Any = path if isinstance(path, pathlib.Path) else path.open("rb")
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise CheckpointError(f"checkpoint {path} holds compressed entries, which torch.save never writes")
        if isinstance(source, io.BytesIO):
            source.seek(0)
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(source, map_location="cpu", weights_only=True)
    except LdmError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"checkpoint {path} {_reason(str(error))}") from None
    except PermissionError:
        raise CheckpointError(f"checkpoint {path} may not be read: check its permissions") from None
    except Exception as error:  # a damaged file can raise nearly anything
        first = (str(error).splitlines() or [""])[0][:160]
        raise CheckpointError(
            f"checkpoint {path} is no torch file, or damaged ({type(error).__name__}: {first})"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}, not a dictionary")
    return content


def _reason(message: str) -> str:
    """What a refusal by torch's restricted unpickler comes down to."""
    for pattern in (
        r"Unsupported global: GLOBAL (\S+)",
        r"Trying to (?:load|call reduce for|instantiate)[^`'\"]*?(?:class|global|function)?\s*[`'\"]?([\w.]+\.[\w.]+)",
        r"(?:blocklisted|unsupported)[^`']*[`']([\w.]+)",
    ):
        if found := re.search(pattern, message, re.IGNORECASE):
            return f"is refused: it holds {found[1]}, which is not on the list of harmless classes"
    first = " ".join(message.split())
    first = re.sub(r".*?WeightsUnpickler error: *", "", first)[:160]
    return f"is refused or damaged ({first})"


def plain(value: Any) -> Any:
    """Metadata without classes: Namespaces become dictionaries, paths become text."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, pathlib.PurePath):
        return str(value)
    return value


def state_dict_of(value: Any, path: AnyPath, what: str) -> dict[str, Tensor]:
    """A state dict as plain names → finite dense floating tensors; ``_orig_mod.`` and ``module.`` removed."""
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"checkpoint {path} has no {what} weights")
    state: dict[str, Tensor] = {}
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(f"checkpoint {path}: {what} entry {str(name)[:80]!r} is no dense tensor")
        if not tensor.is_floating_point():
            raise CheckpointError(f"checkpoint {path}: {what} entry {name!r} is {tensor.dtype}, not floating point")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"checkpoint {path}: {what} entry {name!r} claims more than its storage holds")
        while name.startswith(("_orig_mod.", "module.")):
            name = name.partition(".")[2]
        if name in state:
            raise CheckpointError(f"checkpoint {path}: {what} entry {name!r} is there twice, under different prefixes")
        state[name] = tensor
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"checkpoint {path}: {what} entry {name!r} holds NaN or infinite numbers")
    return {name: tensor.float() for name, tensor in state.items()}
