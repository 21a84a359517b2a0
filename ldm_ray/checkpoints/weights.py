"""The weights in what an untrusted file holds: where trainers put them, under which names, and whether they can be
used. Nothing is read before it fits."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm_ray.checkpoints.untrusted.tensors import FLOATS, Stored, Unread
from ldm_ray.models.registry import REGISTRY
from ldm_ray.settings.diffusion import MAX_PARAMETERS
from ldm_ray.settings.errors import CheckpointError, Foreign
from ldm_ray.terminal.text import listed, quoted

log = logging.getLogger(__name__)
WRAPPERS = ("model", "state_dict", "model_state_dict", "model_state", "weights", "params", "net", "network", "module")
AVERAGED = ("ema", "ema_state_dict", "ema_model", "model_ema", "state_dict_ema", "ema_model_state_dict")
DENOISER, PIXELS = "time.fc1.weight", "in_conv.weight"
MAX_WEIGHTS = 10_000
MAX_NAME = 200
MAX_BYTES = 4 * MAX_PARAMETERS  # as float32
State = dict[str, Any]


def unwrapped(content: dict[str, Any]) -> dict[str, Any]:
    """The content with its weights as ``model``, and averaged ones as ``ema``, wherever a trainer put them.

    CheckpointError without the file's name, with the keys that are there, where there are none.
    """
    plain = {key: value for key, value in content.items() if key not in AVERAGED}
    averaged = next((state for key in AVERAGED if (state := weights_under(content.get(key))) is not None), None)
    if averaged is not None:
        plain["ema"] = averaged
    elif isinstance(content.get("ema"), (list, tuple, str, Stored)):
        raise CheckpointError(f"has no denoiser weights as 'ema', but {quoted(content['ema'])}")
    elif isinstance(content.get("ema"), dict) and content["ema"]:
        log.warning("WARNING: averaged weights without names are passed over; 'ema' holds %s", listed(content["ema"]))
    if isinstance(content.get("model"), dict) and not content["model"]:
        return plain  # the message of an empty one is that of its kind
    weights = next((state for key in WRAPPERS if (state := weights_under(content.get(key))) is not None), None)
    if weights is None and any(is_anchor(name) for name in content):
        weights = {key: value for key, value in content.items() if isinstance(value, (Stored, Tensor))}
        plain = {key: value for key, value in plain.items() if key not in weights}
    if weights is None and averaged is None:
        raise Foreign(f"has no 'model' weights; it holds {listed(list(content), 8)}")
    plain["model"] = averaged if weights is None else weights
    return plain


def weights_under(value: Any, depth: int = 0) -> State | None:
    """A dictionary of tensors, itself or in one of the usual wrappers."""
    if not isinstance(value, dict) or depth > 3:
        return None
    if any(isinstance(item, (Stored, Tensor, Unread)) and not is_counter(item) for item in value.values()):
        return value
    return next((state for key in WRAPPERS if (state := weights_under(value.get(key), depth + 1)) is not None), None)


def anchors() -> tuple[str, ...]:
    """Names by which weights are known: of the denoisers, and of each autoencoder."""
    return (DENOISER, *(entry.latent_key for entry in REGISTRY.values()))


def is_anchor(name: Any) -> bool:
    return isinstance(name, str) and len(name) <= MAX_NAME and bare(name).endswith(anchors())


def bare(name: str) -> str:
    """A name without what ``torch.compile`` and ``DistributedDataParallel`` put into it."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module"))


def kind_of(model: Mapping[Any, Any]) -> str:
    """Of weights in a file that does not say."""
    names = [bare(name) for name in model if isinstance(name, str) and len(name) <= MAX_NAME]
    if any(name.endswith(DENOISER) for name in names):
        return "pixel_diffusion" if any(name.endswith(PIXELS) for name in names) else "latent_diffusion"
    return "autoencoder"


def named(value: Any, what: str) -> State:
    """The tensors of a state dict by their plain names, without counters and without what other parts of a trainer's
    module hold; each can be weights. CheckpointError without the file's name."""
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"has no {what} weights")
    if len(value) > MAX_WEIGHTS:
        raise CheckpointError(f"has {len(value):,} names of {what} weights; at most {MAX_WEIGHTS:,} are read")
    state: State = {}
    for name, tensor in value.items():
        if not isinstance(name, str) or len(name) > MAX_NAME:
            raise CheckpointError(
                f"has {what} weights of a name {quoted(name)}; at most {MAX_NAME} characters are read"
            )
        if isinstance(tensor, (bool, int, float, str, bytes)) or tensor is None or is_counter(tensor):
            continue
        short = bare(name)
        if short in state:
            raise CheckpointError(f"{what} entry {quoted(short)} is there twice, under different prefixes")
        state[short] = tensor
    prefixes = {name.removesuffix(anchor) for name in state for anchor in anchors() if name.endswith(anchor)}
    prefixes = {prefix for prefix in prefixes if not prefix or prefix.endswith(".")}
    chosen = min(prefixes, key=lambda prefix: ("ema" not in prefix.lower(), len(prefix)), default="")
    others = tuple(prefix for prefix in prefixes if prefix and prefix != chosen and not chosen.startswith(prefix))
    kept = {
        name.removeprefix(chosen): tensor
        for name, tensor in state.items()
        if name.startswith(chosen) and not (others and name.startswith(others))
    }
    for name, tensor in kept.items():
        check(name, tensor, what)
    return kept


def is_counter(tensor: Any) -> bool:
    """A whole number that a trainer counts with, such as ``n_averaged`` or ``num_batches_tracked``."""
    return isinstance(tensor, (Stored, Tensor)) and tensor.numel() == 1 and tensor.dim() < 2 and not is_number(tensor)


def is_number(tensor: Stored | Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def state_dict_of(value: Any, what: str) -> dict[str, Tensor]:
    """A state dict as plain names → finite dense float32 tensors. CheckpointError without the file's name."""
    state = named(value, what)
    size = sum(4 * math.prod(tensor.shape) for tensor in state.values())
    if size > MAX_BYTES:
        raise CheckpointError(f"has {size / 1e6:,.0f} MB of {what} weights; at most {MAX_BYTES / 1e6:,.0f} are read")
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        plain[name] = (tensor.read() if isinstance(tensor, Stored) else tensor).float()
        if not bool(torch.isfinite(plain[name]).all()):
            raise CheckpointError(f"{what} entry {quoted(name)} holds NaN or infinite numbers, or ones beyond float32")
    return plain


def check(name: str, tensor: Any, what: str) -> None:
    """CheckpointError unless the tensor can be weights."""
    entry = f"{what} entry {quoted(name)}"
    if isinstance(tensor, Tensor):
        if tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(f"{entry} is no dense tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{entry} claims more than its storage holds")
    elif not isinstance(tensor, Stored):
        raise CheckpointError(f"{entry} is no dense tensor, but {quoted(tensor)}")
    elif tensor.problem:
        raise CheckpointError(f"{entry} {tensor.problem}")
    if tensor.dtype not in FLOATS:
        raise CheckpointError(f"{entry} is {tensor.dtype}, not floating point of 16, 32 or 64 bits")
