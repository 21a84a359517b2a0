"""Damaged and hostile checkpoint files: one clear line each, and nothing in them is ever executed."""

from __future__ import annotations

import argparse
import builtins
import os
import pickle
import random
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_ray.checkpoints.checkpoint import FORMAT_VERSION, load_autoencoder, load_diffusion
from ldm_ray.models import registry
from ldm_ray.models.denoiser import Denoiser
from ldm_ray.settings.errors import CheckpointError


class Evil:
    """Unpickling it calls the function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def weights(**changes: Any) -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return dict(registry.build("mlp", 16).state_dict()) | changes


def refusal(load: Callable[[Path], Any], path: Path) -> str:
    """The one line that the file gives."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700, message
    assert str(path) in message
    return message


def autoencoder_refusal(tmp_path: Path, content: Any) -> str:
    torch.save(content, tmp_path / "a.pt")
    return refusal(load_autoencoder, tmp_path / "a.pt")


pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:Validating sparse tensor")


@pytest.mark.parametrize("place", ["args", "model", "optimizer", "exp_name"])
@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "old"])
def test_os_system_is_named_and_never_run(tmp_path: Path, place: str, old_format: bool) -> None:
    marker = tmp_path / "marker"
    content = {"model": weights(), "args": {}} | {place: Evil(os.system, f"touch '{marker}'")}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not old_format)
    for load in (load_autoencoder, load_diffusion):
        message = refusal(load, tmp_path / "a.pt")
        assert "refused" in message and f"{os.system.__module__}.system" in message
    assert not marker.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)  # the file does bite a careless reader
    assert marker.exists()


def test_eval_and_popen_are_named_and_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    command = f"open({str(marker)!r}, 'w')"
    message = autoencoder_refusal(tmp_path, {"model": weights(), "args": Evil(builtins.eval, command)})
    assert "eval" in message and "refused" in message
    message = autoencoder_refusal(
        tmp_path, {"model": weights(), "args": Evil(subprocess.Popen, ["touch", str(marker)])}
    )
    assert "Popen" in message and "refused" in message
    assert not marker.exists()


def test_a_bare_hostile_pickle_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "a.pt").write_bytes(pickle.dumps({"model": Evil(os.system, f"touch '{marker}'")}, protocol))
        refusal(load_autoencoder, tmp_path / "a.pt")
    assert not marker.exists()


def test_a_harmless_but_unlisted_class_is_named(tmp_path: Path) -> None:
    message = autoencoder_refusal(tmp_path, {"model": weights(), "args": argparse.ArgumentTypeError("x")})
    assert "argparse.ArgumentTypeError" in message and "list of harmless classes" in message


@pytest.mark.parametrize("load", [load_autoencoder, load_diffusion])
def test_what_is_no_torch_file(tmp_path: Path, load: Callable[[Path], Any]) -> None:
    path = tmp_path / "x.pt"
    assert "does not exist" in refusal(load, path)
    path.touch()
    assert "is empty" in refusal(load, path)
    path.write_text("not a checkpoint,\nbut two lines\n")
    refusal(load, path)
    path.write_bytes(b"\x80\x02")
    refusal(load, path)
    for seed in range(20):
        path.write_bytes(random.Random(seed).randbytes(1000))
        refusal(load, path)
    assert "is a folder" in refusal(load, tmp_path)
    for content, name in ([1, 2], "list"), (torch.zeros(3), "Tensor"), ("text", "str"), (None, "NoneType"):
        torch.save(content, path)
        assert f"holds a {name}, not a dictionary" in refusal(load, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refusal(load, path)


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "old"])
def test_every_truncation_is_refused(tmp_path: Path, old_format: bool) -> None:
    content = {"model": weights(), "args": {"model": "mlp"}}
    torch.save(content, tmp_path / "whole.pt", _use_new_zipfile_serialization=not old_format)
    whole = (tmp_path / "whole.pt").read_bytes()
    cut = tmp_path / "cut.pt"
    for length in (1, 2, 10, 100, 1000, len(whole) // 3, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        cut.write_bytes(whole[:length])
        refusal(load_autoencoder, cut)


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    torch.save({"model": weights()}, tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as old,
        zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert "compressed" in refusal(load_autoencoder, tmp_path / "a.pt")


BIAS = "encoder.net.1.bias"
WRONG_WEIGHTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "NaN": (lambda: weights(**{BIAS: torch.full((512,), torch.nan)}), f"'{BIAS}' holds NaN or infinite"),
    "infinity": (lambda: weights(**{BIAS: torch.full((512,), torch.inf)}), f"'{BIAS}' holds NaN or infinite"),
    "wrong shape": (lambda: weights(**{BIAS: torch.zeros(511)}), BIAS),
    "expanded": (lambda: weights(**{BIAS: torch.zeros(1).expand(512)}), f"'{BIAS}' claims more than its storage"),
    "huge expanded": (lambda: weights(**{BIAS: torch.zeros(1).expand(10**12)}), "claims more than its storage"),
    "sparse": (lambda: weights(**{BIAS: torch.zeros(512).to_sparse()}), BIAS),
    "integers": (lambda: weights(**{BIAS: torch.zeros(512, dtype=torch.int64)}), "not floating point"),
    "complex": (lambda: weights(**{BIAS: torch.zeros(512, dtype=torch.complex64)}), "not floating point"),
    "list": (lambda: weights(**{BIAS: [0.0] * 512}), "is no dense tensor"),
    "missing": (lambda: {name: value for name, value in weights().items() if name != BIAS}, BIAS),
    "one too many": (lambda: weights(**{"extra.weight": torch.zeros(3)}), r"extra.weight"),
    "scalar latent key": (lambda: weights(**{"encoder.net.7.weight": torch.tensor(1.0)}), "latent size 0"),
    "none": (dict, "has no autoencoder weights"),
    "of something else": (lambda: {"layer\n1.weight": torch.zeros(3)}, "fit no registered autoencoder (conv, mlp)"),
    "both with and without prefix": (lambda: weights(**{f"module.{BIAS}": torch.ones(512)}), BIAS),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_unusable_weights_are_refused(tmp_path: Path, case: str) -> None:
    make, words = WRONG_WEIGHTS[case]
    assert words in autoencoder_refusal(tmp_path, {"model": make(), "args": {}})


WRONG_METADATA: list[tuple[dict[str, Any], str]] = [
    ({"args": {"model": "ae-vqvae"}}, "'ae-vqvae' is unknown; registered are conv, mlp"),
    ({"args": {"model": "ae-conv"}}, "says 'conv', but the weights are of type 'mlp'"),
    ({"args": {"latent_dim": 32}}, "latent_dim 32, but the weights have 16"),
    ({"args": {"latent_dim": "a\nb"}}, "whole number from 1 to 1024, not 'a\\nb'"),
    ({"args": [1]}, "'args' is a list"),
    ({"args": "text"}, "'args' is a str"),
    ({"model": torch.zeros(3)}, "no 'model' weights"),
    ({"model": [("a", 1)]}, "no 'model' weights"),
    ({"kind": "pixel\ndiffusion"}, "known are autoencoder"),
    ({"kind": ["autoencoder"]}, "known are autoencoder"),
    ({"statistics": {"mean": torch.zeros(16)}}, "statistics are damaged"),
    ({"statistics": {"mean": torch.zeros(15), "covariance": torch.eye(15)}}, "statistics are damaged"),
    ({"statistics": {"mean": torch.zeros(16), "covariance": torch.eye(16) * torch.nan}}, "statistics are damaged"),
    ({"statistics": {"mean": torch.zeros(16), "covariance": torch.eye(16).to_sparse()}}, "statistics"),
    ({"format_version": FORMAT_VERSION + 1, "versions": {"ldm_ray": "9.8.7"}}, "install ldm_ray 9.8.7"),
    ({"format_version": FORMAT_VERSION + 1, "versions": {"ldm_ray": "9\n8"}}, "install ldm_ray"),
    ({"format_version": FORMAT_VERSION + 1}, "install ldm_ray a newer version"),
    ({"format_version": "two\nlines"}, f"reads up to {FORMAT_VERSION}"),
]


def test_metadata_that_holds_itself_is_refused(tmp_path: Path) -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    for key in ("args", "config", "epoch", "exp_name"):
        assert "nested without end" in autoencoder_refusal(tmp_path, {"model": weights(), key: endless})


@pytest.mark.parametrize(("changes", "words"), WRONG_METADATA, ids=[words for _, words in WRONG_METADATA])
def test_unusable_metadata_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in autoencoder_refusal(tmp_path, {"model": weights(), "args": {}} | changes)


WRONG_DENOISERS: list[tuple[dict[str, Any], str]] = [
    ({"args": {"T": 1}}, "'args.T' must be a whole number from 2 to 100000, not 1"),
    ({"args": {"T": 10**12}}, "T"),
    ({"args": {"T": float("inf")}}, "T"),
    ({"args": {"T": "many"}}, "many"),
    ({"args": {"T": torch.zeros(2)}}, "T"),
    ({"args": {"beta_start": 0.5, "beta_end": 0.1}}, "noise schedule"),
    ({"args": {"beta_end": float("nan")}}, "'args.beta_end' must be a number"),
    ({"args": {"beta_schedule": "sigmoid"}}, "must be one of linear, scaled_linear, squaredcos_cap_v2"),
    ({"schedule": [1]}, "'schedule' is a list"),
    ({"autoencoder": 3}, "autoencoder is damaged"),
    ({"autoencoder": {"model": {}}}, "no autoencoder weights"),
    ({"autoencoder": {"type": "vae", "model": weights()}}, "registered are conv, mlp"),
    ({"ema": {"a": torch.zeros(1)}}, "not the denoiser's"),
    ({"ema": [1]}, "no denoiser weights"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG_DENOISERS, ids=[str(i) for i in range(len(WRONG_DENOISERS))])
def test_unusable_denoisers_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    torch.save({"model": Denoiser(hidden_dim=16).state_dict(), "args": {}} | changes, tmp_path / "d.pt")
    assert words in refusal(load_diffusion, tmp_path / "d.pt")


@pytest.mark.parametrize(
    "changes",
    [
        {"in_proj.weight": torch.zeros(17, 16)},
        {"in_proj.weight": torch.zeros(16)},
        {"in_proj.weight": torch.zeros(200_000, 1)},  # sizes that would fill the memory if they were believed
        {"time.fc1.weight": torch.zeros(300_000, 2)},
        {"time.fc1.weight": torch.zeros(256, 127)},
        {"b4b.fc.weight": torch.full((16, 16), torch.nan)},
        {"b5a.fc.weight": torch.zeros(16, 16)},
    ],
    ids=lambda changes: "-".join([*changes, *(str(tuple(value.shape)) for value in changes.values())]),
)
def test_denoisers_of_wrong_shapes_are_refused(tmp_path: Path, changes: dict[str, torch.Tensor]) -> None:
    torch.save({"model": Denoiser(hidden_dim=16).state_dict() | changes}, tmp_path / "d.pt")
    message = refusal(load_diffusion, tmp_path / "d.pt")
    assert any(words in message for words in ("not the denoiser's", "NaN", "is too large", "has embeddings of 300000"))
    assert "allocate" not in message
