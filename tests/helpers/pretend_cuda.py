"""A rehearsal of CUDA where there is none: tensors of the CPU that say they are on ``cuda:0``.

``with pretending() as seen`` runs whatever is inside on them, in all threads that begin there. As on a GPU, a call
that mixes devices, a generator of the wrong side, an index of the wrong side and ``numpy()`` raise. ``seen.waits``
counts what would have kept the host waiting for the device: reading a value, a copy to the CPU, a copy from the CPU
that is not asked for as non-blocking or not from pinned memory. Numbers are the CPU's. What it cannot show: kernels,
memory, bits and speed of a GPU.

As a plugin it rehearses the tests that need a GPU: python -m pytest -p tests.helpers.pretend_cuda -m gpu
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

from ldm_ray.engine.tiles import PIXEL_SIZES, SIZES
from tests.helpers.data import ROOT

CUDA = torch.device("cuda", 0)
OWN = [str(ROOT / name) for name in ("ldm_ray", "serve", "tune", "benchmarks")]
T: Any = torch.Tensor
MEMORY = 80 * 10**9
NAME = "Pretended GPU"
GROUP = "_group_tensors_by_device_and_dtype"

PLACES = {T.device.__get__: "device", T.is_cuda.__get__: "is_cuda", T.is_cpu.__get__: "is_cpu"}
MOVES = {T.to, T.cpu}
READS = {T.item, T.tolist, T.__bool__, T.__float__, T.__int__, T.__index__, T.__complex__, torch.equal, T.equal}
READS |= {torch.nonzero, T.nonzero, T.unique, torch.unique, torch.bincount, T.bincount, T.masked_select}
READS |= {torch.masked_select, torch.allclose, T.allclose}  # their results' sizes or answers are the device's to give
FROM_NUMBERS = {torch.tensor, torch.as_tensor, T.new_tensor}
ANY_SIDE = {T.type_as, T.as_subclass, T.grad.__set__}  # take a tensor of another device


class Mismatch(RuntimeError):
    """What PyTorch refuses on a GPU."""


@dataclass
class Seen:
    """waits: what waited for the device, by call and place; calls: those with the device's tensors."""

    waits: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    refused: bool = False  # whether a wait is an error, as torch.cuda.set_sync_debug_mode has it

    def clear(self) -> None:
        self.waits.clear()
        self.calls = 0

    def wait(self, what: str) -> None:
        self.waits[f"{what} at {place()}"] += 1
        if self.refused:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what} at {place()}")


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on ``cuda:0``."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, Seen())  # where no mode is on, as while it is printed

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            with torch._C.DisableTorchFunctionSubclass():
                copy: Any = plain(self).detach().clone().as_subclass(OnCuda).requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copy._is_param = True
            memo[id(self)] = copy
        return memo[id(self)]


class Mode(TorchFunctionMode):
    """Every call of PyTorch in this thread goes through ``run``."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self.seen)


class Generator(torch.Generator):
    """One that remembers the device it was made for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        generator: Any = super().__new__(cls, "cpu")  # type: ignore[call-arg]
        generator.on = CUDA if on_cuda(device) else torch.device("cpu")
        return generator

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.on  # type: ignore[attr-defined]


def run(func: Any, args: Any, kwargs: dict[str, Any], seen: Seen) -> Any:
    """What the call gives, on the device it would be on."""
    if func in PLACES:
        return place_of(func, args[0])
    tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
    on_device = [tensor for tensor in tensors if isinstance(tensor, OnCuda)]
    seen.calls += bool(on_device)
    if func in MOVES:
        return moved(func, args, kwargs, seen)
    if func is T.is_pinned:
        return getattr(args[0], "pinned", False)
    if func is T.pin_memory:
        return pinned(args[0])
    if func is torch._has_compatible_shallow_copy_type:
        return len(on_device) in (0, len(tensors))
    asked = kwargs.get("device")
    target = on_cuda(asked) if asked is not None else bool(on_device)
    refuse(func, args, kwargs, target, tensors)
    count_waits(func, args, kwargs, target, tensors, seen)
    kwargs = dict(kwargs)
    pin = kwargs.pop("pin_memory", False)
    if asked is not None and target:
        kwargs["device"] = torch.device("cpu")
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
        own = {id(tensor) for tensor in tensors}
        result = tree_map(lambda value: value if id(value) in own else put(value, target), result)
    if pin:
        result.pinned = True
    return result


def place_of(getter: Any, tensor: Tensor) -> Any:
    if isinstance(tensor, OnCuda):
        return {"device": CUDA, "is_cuda": True, "is_cpu": False}[PLACES[getter]]
    with torch._C.DisableTorchFunctionSubclass():
        return getter(tensor)


def moved(func: Any, args: Any, kwargs: dict[str, Any], seen: Seen) -> Tensor:
    """``to`` and ``cpu``."""
    tensor, rest = args[0], list(args[1:])
    asked = torch.device("cpu") if func is T.cpu else kwargs.get("device")
    for value in rest:
        if isinstance(value, (str, torch.device, Tensor)):
            asked = value.device if isinstance(value, Tensor) else value
    was = isinstance(tensor, OnCuda)
    target = was if asked is None else on_cuda(asked)
    if target and not was and not (kwargs.get("non_blocking") and getattr(tensor, "pinned", False)):
        seen.wait("copy to the device")
    if was and not target:
        seen.wait("copy to the CPU")
    types = [value.dtype if isinstance(value, Tensor) else value for value in rest]
    types = [value for value in types if isinstance(value, torch.dtype)]
    how = {name: value for name, value in kwargs.items() if name in ("dtype", "memory_format", "copy")}
    with torch._C.DisableTorchFunctionSubclass():
        source = tensor.as_subclass(Tensor)
        copy = source.to(*types, **how) if types or how else source
        if target == was:
            return tensor if copy is source else put(copy, target)
        return put(copy.clone() if copy is source else copy, target)


def pinned(tensor: Tensor) -> Tensor:
    if isinstance(tensor, OnCuda):
        raise Mismatch("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    with torch._C.DisableTorchFunctionSubclass():
        copy: Any = tensor.clone()
    copy.pinned = True
    return copy


def refuse(func: Any, args: Any, kwargs: dict[str, Any], target: bool, tensors: list[Tensor]) -> None:
    """Mismatch, or numpy's TypeError, on what PyTorch would not do."""
    name = getattr(func, "__name__", str(func))
    generator = kwargs.get("generator")
    if generator is not None and (generator.device.type == "cuda") != target:
        raise Mismatch(f"Expected a '{'cuda' if target else 'cpu'}' device type for generator in {name} at {place()}")
    sides = {isinstance(tensor, OnCuda) for tensor in tensors}
    if func in (T.numpy, T.__array__) and True in sides:
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy at {place()}")
    if len(sides) < 2 or func in ANY_SIDE or func is T.copy_:
        return
    if func in (T.__getitem__, T.__setitem__):
        values = args[2] if func is T.__setitem__ else None
        alien = (
            isinstance(values, Tensor) and values.dim() and isinstance(values, OnCuda) != isinstance(args[0], OnCuda)
        )
        if not isinstance(args[0], OnCuda) or (alien and any(isinstance(v, Tensor) for v in tree_iter(args[1]))):
            raise Mismatch(f"indices and values must be on the indexed tensor's device in {name} at {place()}")
        return
    if any(tensor.dim() for tensor in tensors if not isinstance(tensor, OnCuda)):  # single numbers go along
        raise Mismatch(f"Expected all tensors to be on the same device, cuda:0 and cpu in {name} at {place()}")


def count_waits(func: Any, args: Any, kwargs: dict[str, Any], target: bool, tensors: list[Tensor], seen: Seen) -> None:
    on_device = [tensor for tensor in tensors if isinstance(tensor, OnCuda)]
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, OnCuda)]
    name = getattr(func, "__name__", str(func))
    if func in READS and on_device:
        seen.wait(name)
    elif func in FROM_NUMBERS and target:
        seen.wait(f"{name} of numbers")
    elif func in (T.__getitem__, T.__setitem__) and on_device:
        index = [value for value in tree_iter(args[1]) if isinstance(value, Tensor)]
        if any(value.dtype == torch.bool for value in index):
            seen.wait("index by a mask")
        elif on_cpu:
            seen.wait("index or value of the CPU")
    elif func is T.copy_ and on_device and on_cpu:
        from_pinned = getattr(args[1], "pinned", False) and (kwargs.get("non_blocking") or args[2:3] == (True,))
        if not (from_pinned and target):
            seen.wait("copy_ between devices")
    elif func in (torch.repeat_interleave, T.repeat_interleave) and len(on_device) > 1:  # how often, as a tensor
        seen.wait(name)


def put(value: Any, target: bool) -> Any:
    """A tensor on the side that it must say it is on; anything else unchanged."""
    if not isinstance(value, Tensor) or isinstance(value, OnCuda) == target:
        return value
    return value.as_subclass(OnCuda if target else Tensor)  # type: ignore[arg-type]


def plain(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def on_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def place() -> str:
    """The innermost line of the project that the call came from."""
    for frame in reversed(traceback.extract_stack()):
        if any(frame.filename.startswith(folder) for folder in OWN):
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
    return "the test"


def grouped(original: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's grouping of tensors by device, which asks below all that can be overridden."""

    def group(lists: Any, *rest: Any) -> Any:
        with torch._C.DisableTorchFunction():
            groups = original([[t if t is None else plain(t) for t in part] for part in lists], True)
        device = CUDA if any(isinstance(t, OnCuda) for t in lists[0]) else torch.device("cpu")
        return {
            (device, dtype): ([[part[i] for i in positions if part] for part in lists], positions)
            for (_, dtype), (_, positions) in groups.items()
        }

    return group


@contextlib.contextmanager
def pretending(bf16: bool = True, free: int = 60 * 10**9) -> Iterator[Seen]:
    """A machine with one GPU. bf16: whether it has that; free: bytes of its memory."""
    seen = Seen()
    saved: list[tuple[Any, str, Any]] = []

    def patch(home: Any, name: str, value: Any) -> None:
        saved.append((home, name, getattr(home, name)))
        setattr(home, name, value)

    start, context, cuda = threading.Thread.run, torch.autocast, torch.cuda

    def thread_run(thread: threading.Thread) -> None:
        with Mode(seen):
            start(thread)

    for name, answer in {
        "_lazy_init": None, "is_available": True, "current_device": 0, "device_count": 1, "is_initialized": True,
        "is_current_stream_capturing": False, "is_bf16_supported": bf16, "get_device_name": NAME,
        "mem_get_info": (free, MEMORY), "max_memory_allocated": 0, "reset_peak_memory_stats": None,
        "synchronize": None,
    }.items():  # fmt: skip
        patch(cuda, name, lambda *_, answer=answer, **__: answer)
    patch(cuda, "set_sync_debug_mode", lambda mode: setattr(seen, "refused", mode == "error"))
    patch(torch.Tensor, "cuda", lambda tensor, *_, **settings: tensor.to(CUDA, **settings))
    patch(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda optimizer: None)
    for home in map(importlib.import_module, ("torch.optim.optimizer", "torch.nn.utils.clip_grad")):
        patch(home, GROUP, grouped(getattr(home, GROUP)))
    foreach: Any = importlib.import_module("torch.utils._foreach_utils")
    patch(foreach, "_foreach_supported_types", [*foreach._foreach_supported_types, OnCuda])
    patch(torch, "Generator", Generator)
    patch(torch, "autocast", lambda kind, **settings: context("cpu", **settings))
    patch(threading.Thread, "run", thread_run)
    patch(torch.backends.cudnn, "version", lambda: 91000)
    flags: dict[Any, tuple[str, ...]] = {
        torch.backends.cudnn: ("deterministic", "benchmark"),
        torch.utils.deterministic: ("fill_uninitialized_memory",),
    }
    for home, names in flags.items():
        for name in names:
            patch(home, name, getattr(home, name))
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with Mode(seen), mock.patch.dict(PIXEL_SIZES, cuda=(2, 8)):  # 1,024 rows of a U-Net take a CPU seconds
            yield seen
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch.use_deterministic_algorithms(False)
        for home, name, value in reversed(saved):
            setattr(home, name, value)


def pytest_configure(config: Any) -> None:
    SIZES["cuda"] = (4, 32)  # a GPU's tiles take a CPU long
    on = pretending()
    on.__enter__()
    config.add_cleanup(lambda: on.__exit__(None, None, None))
