"""The classes that harmless checkpoints are made of, each with the plain data that it becomes."""

from __future__ import annotations

import _compat_pickle
import contextlib
import datetime
import pathlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ldm_ray.checkpoints.untrusted.tensors import DTYPES, Storage, Stored, Unread, contiguous, stored
from ldm_ray.settings.errors import CheckpointError
from ldm_ray.terminal.text import shown

PLAIN_TYPES = {"int", "float", "str", "bool", "list", "dict", "tuple", "set", "object", "bytes", "complex", "NoneType"}
MAX_KEY_BITS = 60  # whole numbers below that are spread over a dictionary
TORCH_TYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
QUANTISED = {"QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage",
             "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric"}  # fmt: skip
NUMPY_CODES = re.compile(r"[<>|=]?([?]|b1|[fiu][1248])")


@dataclass(frozen=True)
class Name:
    """A known class or function, which is never looked up."""

    full: str

    def __str__(self) -> str:
        return self.full


class Fields(dict[Any, Any]):
    """The attributes of an object."""


@dataclass
class Dtype:
    """Of NumPy: its code, and its byte order."""

    code: str
    order: str = "="

    def __str__(self) -> str:
        return f"numpy.{self.code}"

    def numpy(self) -> np.dtype[Any] | None:
        """None unless it is a number of ordinary size."""
        if not NUMPY_CODES.fullmatch(self.code):
            return None
        return np.dtype(self.code).newbyteorder("=" if self.order == "|" else self.order)  # type: ignore[arg-type]


def known_as(module: str, name: str) -> Name | None:
    """The name under which a class is on the list, None where it is not."""
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    module = _compat_pickle.IMPORT_MAPPING.get(module, module)
    full = f"{module}.{name}"
    if full in RULES or full in VALUES or (module == "builtins" and name in PLAIN_TYPES):
        return Name(full)
    if module in ("torch", "torch.storage") and (name in DTYPES or name in TORCH_TYPES or name in QUANTISED):
        return Name(full)
    if module == "numpy" and re.fullmatch(r"(u?int|float)(8|16|32|64)|bool_?|str_", name):
        return Name(full)
    return None


def call(function: Name, arguments: tuple[Any, ...]) -> Any:
    """What the class or function makes of the arguments. CheckpointError: nothing, being a type and no function."""
    rule = RULES.get(function.full)
    if rule is None:
        raise CheckpointError(f"is refused: it calls {function.full}, which is not on the list of harmless classes")
    return rule(*arguments)


def fill(target: Any, state: Any) -> None:
    """An object's state, where that matters: the attributes of a Namespace, the numbers of an array."""
    if isinstance(target, Fields):
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                target.update(part)
    elif isinstance(target, Dtype):
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|"):
            target.order = state[1]
    elif isinstance(target, Stored) and isinstance(state, tuple) and len(state) == 5:
        _, shape, dtype, fortran, data = state
        fill_array(target, array(data, dtype, shape, "F" if fortran else "C"))


def fill_array(empty: Stored, full: Stored | Unread) -> None:
    if isinstance(full, Unread):
        empty.problem = f"is {full}"
        return
    empty.dtype, empty.shape, empty.stride = full.dtype, full.shape, full.stride
    empty.offset, empty.storage, empty.problem = full.offset, full.storage, full.problem


def empty_array(*_: Any) -> Stored:
    return Stored(torch.uint8, (0,), (1,), 0, Storage(torch.uint8, 0), "is an array without numbers")


def array(data: Any, dtype: Any, shape: Any, order: Any = "C") -> Stored | Unread:
    kind = dtype.numpy() if isinstance(dtype, Dtype) else None
    if kind is None or not isinstance(data, bytes):
        return Unread(f"an array of {dtype}")
    if not kind.isnative:
        data = np.frombuffer(data, kind).astype(kind.newbyteorder("=")).tobytes()
    with contextlib.suppress(TypeError):
        like = torch.from_numpy(np.empty(0, kind.newbyteorder("="))).dtype
        return contiguous(Storage(like, len(data), data=data), shape, fortran=order == "F")
    return Unread(f"an array of {dtype}")


def scalar(dtype: Any, data: Any = b"") -> Any:
    """A number, or a text; of other kinds only what it is."""
    if not isinstance(dtype, Dtype) or not isinstance(data, bytes):
        return Unread("a NumPy value")
    kind = dtype.numpy()
    if kind is not None:
        return np.frombuffer(data, kind)[0].item()
    if re.fullmatch(r"[<>=|]?U\d{1,6}", dtype.code):
        return data.decode("utf-32-be" if dtype.order == ">" else "utf-32-le", "replace").rstrip("\0")
    return Unread(f"a NumPy value of type {dtype.code}")


def dtype_of(code: Any, *_: Any) -> Dtype:
    if isinstance(code, Name):  # numpy.dtype(numpy.float64)
        return Dtype(np.dtype(getattr(np, code.full.partition(".")[2], "O")).str)
    if not isinstance(code, str):
        raise ValueError("a NumPy type without a name")
    return Dtype(code[:20])


def path(pure: type[pathlib.PurePath]) -> Callable[..., str]:
    return lambda *parts: str(pure(*(part for part in parts if isinstance(part, str))))


def moment(kind: Any) -> Callable[..., str]:
    """ISO text of a date or a time."""

    def text_of(data: Any, *_: Any) -> str:
        if isinstance(data, str):
            data = data.encode("latin-1")
        if not isinstance(data, bytes):
            raise ValueError("a date without its bytes")
        return kind(data).isoformat()

    return text_of


def object_of(cls: Any, base: Any = None, state: Any = None, *_: Any) -> Any:
    """``copyreg._reconstructor``."""
    if isinstance(base, Name) and base.full != "builtins.object":
        return dict(state) if isinstance(state, dict) else state
    return call(cls, ()) if isinstance(cls, Name) else Unread("an object")


def pairs(items: Any = (), *_: Any) -> dict[Any, Any]:
    """An OrderedDict or a Counter."""
    if isinstance(items, dict):
        return dict(items)
    return {key_of(key): value for key, value in items}


def key_of(value: Any) -> int | str:
    """A key that costs the same to look up whatever the file says: text, or a whole number of ordinary size."""
    if isinstance(value, str) or (type(value) is int and value.bit_length() < MAX_KEY_BITS):
        return value
    if isinstance(value, tuple):
        return "(" + ", ".join(shown(item, 40) for item in value[:8]) + ")"
    return value[:200].decode("latin-1") if isinstance(value, bytes) else shown(value, 200)


def items_of(items: Any = (), *_: Any) -> list[Any]:
    return list(items) if isinstance(items, (list, tuple)) else []


def encoded(text: Any = "", encoding: Any = "latin-1", *_: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise ValueError("bytes of an unknown encoding")
    return text.encode(encoding)


def as_bytes(data: Any = b"", encoding: Any = "latin-1") -> bytes:
    return data if isinstance(data, bytes) else encoded("" if data == () else data, encoding)


def tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
    return stored(storage, offset, size, stride)


def tensor_of_dtype(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    """``_rebuild_tensor_v3``, whose third of the rest is the type."""
    dtype = rest[2] if len(rest) > 2 else None
    kind = TORCH_TYPES.get(dtype.full.removeprefix("torch.")) if isinstance(dtype, Name) else None
    if kind is None:
        raise ValueError("a tensor without a type")
    return stored(storage, offset, size, stride, kind)


def rebuilt(function: Any, cls: Any, arguments: Any, *_: Any) -> Any:
    """``torch._tensor._rebuild_from_type_v2``: a tensor with attributes, which are left."""
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise ValueError("a tensor of an unknown type")
    return call(function, arguments)


def unread(what: str) -> Callable[..., Unread]:
    return lambda *_: Unread(what)


def text(*parts: Any) -> str:
    return ":".join(str(part)[:100] for part in parts if isinstance(part, (str, int, float)))


RULES: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": pairs,
    "collections.Counter": pairs,
    "collections.defaultdict": lambda *_: {},
    "collections.deque": items_of,
    "builtins.set": items_of,
    "builtins.frozenset": items_of,
    "builtins.dict": pairs,
    "builtins.list": items_of,
    "builtins.bytes": as_bytes,
    "builtins.bytearray": as_bytes,
    "builtins.complex": unread("a complex number"),
    "builtins.slice": unread("a slice"),
    "builtins.range": unread("a range"),
    "argparse.Namespace": lambda *_: Fields(),
    "types.SimpleNamespace": lambda *_: Fields(),
    "uuid.UUID": lambda *_: Fields(),
    "decimal.Decimal": text,
    "fractions.Fraction": text,
    "datetime.datetime": moment(datetime.datetime),
    "datetime.date": moment(datetime.date),
    "datetime.time": moment(datetime.time),
    "datetime.timedelta": text,
    "datetime.timezone": text,
    "copyreg._reconstructor": object_of,
    "_codecs.encode": encoded,
    "numpy.dtype": dtype_of,
    "numpy.ndarray": empty_array,
    "torch.Size": lambda items=(): tuple(items) if isinstance(items, (list, tuple)) else (),
    "torch.device": text,
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_tensor_v3": tensor_of_dtype,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._utils._rebuild_sparse_tensor": unread("a sparse tensor"),
    "torch._utils._rebuild_qtensor": unread("a quantised tensor"),
    "torch._utils._rebuild_nested_tensor": unread("a nested tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": unread("a tensor without numbers"),
    "torch._utils._rebuild_wrapper_subclass": unread("a tensor of an unknown type"),
    "torch._utils._rebuild_device_tensor_from_numpy": lambda data, *_: data,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": rebuilt,
    "torch.serialization._get_layout": text,
    "torch.nn.parameter.Parameter": lambda data=None, *_: data,
}
for _module in ("numpy.core", "numpy._core"):
    RULES |= {
        f"{_module}.multiarray.scalar": scalar,
        f"{_module}.multiarray._reconstruct": empty_array,
        f"{_module}.numeric._frombuffer": array,
    }
for _module in ("pathlib", "pathlib._local"):
    for _name in ("PosixPath", "WindowsPath", "Path", "PurePosixPath", "PureWindowsPath", "PurePath"):
        RULES[f"{_module}.{_name}"] = path(pathlib.PureWindowsPath if "Windows" in _name else pathlib.PurePosixPath)
for _module in ("pytorch_lightning.utilities.parsing", "lightning.pytorch.utilities.parsing",
                "lightning_fabric.utilities.data", "lightning.fabric.utilities.data"):  # fmt: skip
    RULES[f"{_module}.AttributeDict"] = pairs
# Names that stand for themselves: as arguments of the functions above
VALUES = {"torch.Tensor", "torch.FloatTensor", "torch.nn.parameter.Buffer"}
