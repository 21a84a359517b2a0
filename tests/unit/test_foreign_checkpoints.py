"""Checkpoints as ordinary trainers write them are taken, and what is no checkpoint is named as what it is."""

from __future__ import annotations

import collections
import datetime
import decimal
import io
import json
import logging
import os
import pickle
import socket
import struct
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from ldm_ray.checkpoints import checkpoint, runs
from ldm_ray.checkpoints.choose import load
from ldm_ray.data.images import encode_png
from ldm_ray.models import registry
from ldm_ray.models.denoiser import Denoiser
from ldm_ray.settings.errors import CheckpointError


def weights(kind: str = "mlp") -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return dict(registry.build(kind, 16).state_dict())


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in weights().items()}


def array_of(value: torch.Tensor) -> np.ndarray:
    return value.numpy()


COMPANY: dict[str, Any] = {
    "rng": np.random.default_rng(1).bit_generator.state,
    "old_rng": np.random.RandomState(1).get_state(),
    "history": np.arange(10),
    "big_endian": np.arange(3, dtype=">f4"),
    "columns": np.asfortranarray(np.ones((2, 3))),
    "objects": np.array([{}, 1], dtype=object),
    "names": np.array(["a", "bc"]),
    "stamp": np.datetime64("2020-01-01"),
    "type": np.float32,
    "dtype": np.dtype("f4"),
    "began": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
    "took": datetime.timedelta(1, 2),
    "curves": collections.defaultdict(list, {"loss": [0.5]}),
    "order": collections.OrderedDict(a=1),
    "counts": collections.Counter("aab"),
    "window": collections.deque([1, 2], 3),
    "seen": {1, 2},
    "frozen": frozenset([1]),
    "complex": 1j,
    "bytes": b"abc",
    "array": bytearray(b"abc"),
    "slice": slice(1, 2),
    "price": decimal.Decimal("1.5"),
    "id": uuid.UUID(int=7),
    "settings": types.SimpleNamespace(a=1),
    "device": torch.device("cpu"),
    "precision": torch.float32,
    "sparse": torch.zeros(3).to_sparse(),
    "words": torch.zeros(3, dtype=torch.uint16),
}


@pytest.mark.parametrize("settings", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}], ids=str)
def test_harmless_company_is_passed_over(tmp_path: Path, settings: dict[str, Any]) -> None:
    content = {"model": weights(), "epoch": np.int64(3), "train_loss": np.float32(0.5), "args": {"lr": np.float64(0.1)}}
    torch.save(content | COMPANY, tmp_path / "a.pt", **settings)
    loaded = checkpoint.load_autoencoder(tmp_path / "a.pt")
    assert loaded.info == {"epoch": 3, "train_loss": 0.5, "args": {"lr": 0.1}}


def test_metadata_becomes_plain_data(tmp_path: Path) -> None:
    args = {"when": datetime.date(2026, 1, 2), "sizes": (np.int32(3), 4), "groups": collections.defaultdict(int, a=1)}
    torch.save({"model": weights(), "args": args, "val_loss": torch.tensor(0.25)}, tmp_path / "a.pt")
    info = checkpoint.load_autoencoder(tmp_path / "a.pt").info
    assert info == {"args": {"when": "2026-01-02", "sizes": [3, 4], "groups": {"a": 1}}, "val_loss": 0.25}
    assert json.dumps(info, allow_nan=False)


def test_a_loss_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    torch.save(
        {"model": weights(), "train_loss": float("nan"), "val_loss": float("inf"), "epoch": 1}, tmp_path / "a.pt"
    )
    assert checkpoint.load_autoencoder(tmp_path / "a.pt").info == {"epoch": 1}


ONE = torch.tensor(1)
WRAPPED: dict[str, Callable[[], dict[str, Any]]] = {
    "state_dict": lambda: {"state_dict": weights(), "epoch": 2},
    "model_state_dict": lambda: {"model_state_dict": weights(), "optimizer_state_dict": {"state": {}}, "loss": 0.1},
    "in two": lambda: {"model": {"state_dict": weights(), "step": 3}, "ema": 0.999},
    "bare": weights,
    "bare, DDP": lambda: prefixed("module."),
    "bare, compiled": lambda: prefixed("_orig_mod."),
    "bare, of a module": lambda: prefixed("model."),
    "bare, all of them": lambda: prefixed("module.autoencoder._orig_mod."),
    "compiled within": lambda: {name.replace("encoder.", "encoder._orig_mod."): v for name, v in weights().items()},
    "Lightning": lambda: {
        "state_dict": prefixed("net.") | {"criterion.weight": torch.ones(3)},
        "pytorch-lightning_version": "2.5",
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best": torch.tensor(1.0)}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}],
        "hyper_parameters": {"lr": 0.1, "latent_dim": 16},
    },
    "counters": lambda: {
        "model": weights() | {"n_averaged": torch.tensor(3), "b.num_batches_tracked": torch.tensor(5)}
    },
    "parameters": lambda: {"model": {name: torch.nn.Parameter(value) for name, value in weights().items()}},
    "arrays": lambda: {"model": {name: array_of(value) for name, value in weights().items()}},
    "columns first": lambda: {"model": {name: value.t().contiguous().t() for name, value in weights().items()}},
    "other words": lambda: {"model": weights(), "config": "a.yaml", "data": "mnist", "metrics": [1], "args": None},
}


@pytest.mark.parametrize("case", WRAPPED)
def test_weights_are_found_where_trainers_put_them(tmp_path: Path, case: str) -> None:
    torch.save(WRAPPED[case](), tmp_path / "a.pt")
    loaded = checkpoint.load_autoencoder(tmp_path / "a.pt").codec.model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights().items())


def test_averaged_weights_of_torch_are_taken(tmp_path: Path) -> None:
    model = Denoiser(hidden_dim=16)
    other = Denoiser(hidden_dim=16)
    averaged = AveragedModel(other)
    for key in ("ema", "ema_state_dict"):
        torch.save({"model_state_dict": model.state_dict(), key: averaged.state_dict()}, tmp_path / "d.pt")
        loaded = checkpoint.load_diffusion(tmp_path / "d.pt").denoiser.state_dict()
        assert torch.equal(loaded["in_proj.weight"], other.in_proj.weight)


def test_settings_of_another_trainer_count(tmp_path: Path) -> None:
    state = {f"model.{name}": value for name, value in Denoiser(hidden_dim=16).state_dict().items()}
    hyper = {"T": 200, "beta_end": 0.05, "model": "lit-denoiser"}
    torch.save({"state_dict": state, "hyper_parameters": hyper}, tmp_path / "d.pt")
    schedule = checkpoint.load_diffusion(tmp_path / "d.pt").schedule
    assert (schedule.num_train_timesteps, schedule.beta_end) == (200, 0.05)


def test_keys_are_named_where_none_is_known(tmp_path: Path) -> None:
    torch.save({"generator": {"w": torch.ones(3)}, "epoch\n": 3}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"has no 'model' weights; it holds 'generator', 'epoch\\n'$"):
        checkpoint.load_autoencoder(tmp_path / "a.pt")


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    data = b""
    for name, tensor in tensors.items():
        part = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        kind = {torch.float32: "F32", torch.float16: "F16"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def test_safetensors_are_read(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", weights("conv"), {"model": "conv", "latent_dim": "16"})
    loaded = checkpoint.load_autoencoder(tmp_path / "a.safetensors")
    assert loaded.codec.kind == "conv" and loaded.info["args"] == {"model": "conv", "latent_dim": 16}
    assert all(torch.equal(loaded.codec.model.state_dict()[name], value) for name, value in weights("conv").items())
    half = {name: value.half() for name, value in weights().items()}
    write_safetensors(tmp_path / "b.safetensors", half, {})
    model = checkpoint.load_autoencoder(tmp_path / "b.safetensors").codec.model.state_dict()
    assert all(torch.equal(model[name], value.float()) for name, value in half.items())


def picture(kind: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, kind)
    return buffer.getvalue()


NO_CHECKPOINTS: dict[str, tuple[bytes, str]] = {
    "LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "is a Git LFS pointer .*git lfs pull",
    ),
    "page": (b"\n<!DOCTYPE html><html>", "is a web page"),
    "PNG": (encode_png(np.zeros((8, 8), np.uint8)), "is a PNG picture, not a checkpoint"),
    "JPEG": (picture("JPEG"), "is a JPEG picture, not a checkpoint"),
    "text": ("ein Wort, größer\n".encode(), "is text, not a checkpoint"),
    "JSON": (b'{"epoch": 3}', "is JSON text, not a checkpoint"),
    "gzip": (b"\x1f\x8b" + b"\0" * 20, "is compressed with gzip: unpack it first"),
    "pickle": (pickle.dumps({"a": 1}), r"is a pickle, but none of torch\.save"),
    "noise": (bytes(range(256)), "is no torch file, or damaged"),
}


@pytest.mark.parametrize("case", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, case: str) -> None:
    content, words = NO_CHECKPOINTS[case]
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load_autoencoder(tmp_path / "a.pt")


def test_a_link_in_a_circle_a_pipe_and_an_impossible_name_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "circle.pt").symlink_to(tmp_path / "circle.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    for name, words in ("circle.pt", "cannot be read"), ("pipe.pt", "no regular file"), ("x" * 300, "cannot be read"):
        with pytest.raises(CheckpointError, match=words):
            checkpoint.load_autoencoder(tmp_path / name)
    with pytest.raises(CheckpointError, match="null byte"):
        checkpoint.load_autoencoder(tmp_path / "a\0b")


# --- what is found, and what is never opened ---


def write_denoiser(path: Path, **args: Any) -> Path:
    """A denoiser of the existing format, without its autoencoder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": Denoiser(hidden_dim=16).state_dict(), "args": {"ae_model": "ae-mlp"} | args}, path)
    return path


def test_a_recorded_address_is_never_asked(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        address = f"s3://bucket/ae.pt?endpoint_override=http://127.0.0.1:{listener.getsockname()[1]}"
        path = write_denoiser(tmp_path / "d.pt", ae_ckpt=address)
        with pytest.raises(CheckpointError, match="carries no autoencoder: name the ae-mlp checkpoint"):
            load(path, search=[tmp_path])
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_recorded_path_is_not_followed_out_of_the_folders_searched(tmp_path: Path) -> None:
    torch.save({"model": weights()}, tmp_path / "outside.pt")
    for recorded in (str(tmp_path / "outside.pt"), "../outside.pt", "/etc/passwd", "a\0b", "x" * 5000, "\ud800"):
        path = write_denoiser(tmp_path / "in" / "d.pt", ae_ckpt=recorded)
        with pytest.raises(CheckpointError, match="carries no autoencoder") as caught:
            load(path, search=[tmp_path / "in"])
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_of_several_autoencoders_the_recorded_one_is_taken(tmp_path: Path) -> None:
    path = write_denoiser(tmp_path / "d.pt", ae_ckpt="C:\\runs\\checkpoints\\first\\latest.pt")
    for name in ("first", "second"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        torch.save({"model": weights()}, tmp_path / "checkpoints" / name / "latest.pt")
    os.utime(tmp_path / "checkpoints" / "first" / "latest.pt", (1, 1))
    loaded = load(path, search=[tmp_path]).autoencoder
    assert loaded is not None and Path(loaded.path).parent.name == "first"


def test_discovery_passes_over_what_is_not_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"model": weights()}, tmp_path / "ae.pt")
    os.utime(tmp_path / "ae.pt", (1, 1))
    (tmp_path / "dangling.pt").symlink_to(tmp_path / "gone.pt")
    (tmp_path / "circle.pt").symlink_to(tmp_path / "circle.pt")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "words.pt").write_text("no checkpoint")
    torch.save({"model": {"layer.weight": torch.zeros(3)}}, tmp_path / "other.pt")
    with (tmp_path / "huge.pt").open("wb") as stream:
        stream.truncate(2**40)
    with caplog.at_level(logging.INFO):
        found = runs.find_autoencoder(tmp_path)
    assert found is not None and found.path == str(tmp_path / "ae.pt")
    assert all("huge.pt" in line or "folder.pt" in line for line in caplog.messages), caplog.messages


def test_discovery_reads_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"model": {"layer.weight": torch.zeros(1_000_000)}}, tmp_path / "other.pt")
    read: list[int] = []
    plain_read = io.BufferedReader.read

    class Counted(io.BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            data = plain_read(self, size)
            read.append(len(data))
            return data

    monkeypatch.setattr(Path, "open", lambda self, mode="r": Counted(io.FileIO(self, mode)))
    assert runs.find_autoencoder(tmp_path) is None
    assert 0 < sum(read) < 10_000
