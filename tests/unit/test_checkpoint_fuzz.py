"""Ten thousand files that are nearly good ones: each is read or refused in one line, and what is read is of the types
and within the ranges that everything after it relies on."""

from __future__ import annotations

import copy
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_ray.checkpoints import checkpoint
from ldm_ray.checkpoints.record import checked
from ldm_ray.checkpoints.restore import check_denoiser, image_size_of, schedule_of
from ldm_ray.checkpoints.safe_load import contents
from ldm_ray.checkpoints.untrusted.tensors import Source, Unread
from ldm_ray.checkpoints.weights import named, unwrapped
from ldm_ray.data.classes import names_in
from ldm_ray.diffusion.samplers import plan_of
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.models import registry
from ldm_ray.models.denoiser import Denoiser
from ldm_ray.settings.errors import CheckpointError, LdmError
from ldm_ray.settings.sampling import SAMPLERS, SamplingConfig

HERE = Path("a.pt")


def good() -> dict[str, Any]:
    """A denoiser with an autoencoder, both as small as they can be."""
    autoencoder = {
        "type": "mlp",
        "latent_dim": 2,
        "image_size": [28, 28],
        "path": "/a/latest.pt",
        "sha256": "0" * 64,
        "only_digit": None,
        "train_seconds": 3.5,
        "model": registry.build("mlp", 2).state_dict(),
        "statistics": {"mean": torch.zeros(2), "covariance": torch.eye(2)},
    }
    model = Denoiser(latent_dim=2, hidden_dim=4, num_classes=3, embedding_dim=8, sinusoid_dim=4, num_blocks=1)
    config = {"lr": 1e-3, "T": 20, "only_digit": 1, "beta_start": 1e-4, "beta_end": 0.02, "seed": 1}
    return {
        "format_version": 1,
        "kind": "latent_diffusion",
        "model": dict(model.state_dict()),
        "ema": dict(model.state_dict()),
        "args": config | {"model": "lddpm", "ae_model": "ae-mlp", "ae_ckpt": "/a/latest.pt", "image_size": None},
        "config": config,
        "schedule": {"beta_schedule": "linear", "num_train_timesteps": 20, "beta_start": 1e-4, "beta_end": 0.02},
        "prediction_type": "epsilon",
        "num_classes": 3,
        "epoch": 3,
        "global_step": 30,
        "train_loss": 0.5,
        "val_loss": 0.6,
        "train_seconds": 7.0,
        "exp_name": "run",
        "quality": {"epoch": 3, "fd_lenet": 4.0},
        "metrics": {"epoch": 3},
        "data": {"revision": "abc", "class_names": ["a", "b", "c"], "image_size": [28, 28]},
        "versions": {"ldm_ray": "0.1.0"},
        "autoencoder": autoencoder,
    }


def strange(draw: random.Random) -> Any:
    """A value that belongs nowhere in particular."""
    endless: list[Any] = []
    endless.append(endless)
    deep: Any = 0
    for _ in range(80):
        deep = [deep]
    wide, expanded = torch.full((2,), 1e300, dtype=torch.float64), torch.zeros(1).expand(10**9)
    return draw.choice(
        [None, True, False, 0, 1, -1, 2, 5, 11, 10**6, 10**18, -(10**30), 2**2000, 0.0, 0.5, 3.5, 1e300, -1e-300,
         5e-324, 1.0, 0.9999999, math.nan, math.inf, -math.inf, "", "x", "mlp", "ae-conv", "7", "s3://a/b", "a\nb",
         "x" * 10_000, "\x1b[31m", "\ud800", "linear", "v_prediction", "autoencoder", "pixel_diffusion", b"", b"\xff",
         [], [1], [28, 28], [0, 0], [1, 2, 3], (), (1,), {}, {"a": 1}, {"model": {}}, endless, deep, wide, expanded,
         Unread("a sparse tensor"), torch.zeros(()), torch.tensor(math.nan), torch.zeros(3), torch.zeros(2, 2),
         torch.zeros(0), torch.zeros(2, dtype=torch.int64), torch.tensor(4), torch.zeros(3).to_sparse(),
         torch.zeros(2, device="meta"), torch.zeros(2, dtype=torch.complex64)]
    )  # fmt: skip


def mutate(content: dict[str, Any], draw: random.Random) -> None:
    """Changes values, keys and structure in one to three places."""
    for _ in range(draw.randint(1, 3)):
        place: Any = content
        while isinstance(place, dict) and place and draw.random() < 0.65:
            inner = [value for value in place.values() if isinstance(value, dict) and value]
            if not inner:
                break
            place = draw.choice(inner)
        keys = list(place)
        key = draw.choice(keys) if keys else "x"
        what = draw.random()
        if what < 0.15:
            place.pop(key, None)
        elif what < 0.25:
            place[draw.choice(["model", "args", "ema", "kind", "state_dict", "T", "x.y", "module.x", "a\nb", 7])] = (
                strange(draw)
            )
        elif what < 0.3 and keys:
            place[draw.choice([f"module.{key}", f"model.{key}", f"{key}" * 300, "b9a.fc.weight"])] = place.pop(key)
        else:
            place[key] = strange(draw)


def use(content: dict[str, Any]) -> None:
    """What every command does with a checkpoint's description before it makes a network."""
    read = checked(unwrapped(content))
    info = checkpoint.summary(read)
    json.dumps({key: info.get(key) for key in ("epoch", "train_loss", "val_loss", "exp_name")}, allow_nan=False)
    assert all(isinstance(read[key], dict) for key in ("args", "config", "data", "schedule", "versions"))
    only = read["args"].get("only_digit")
    assert only is None or (type(only) is int and only >= 0)
    assert len(json.dumps(info, default=str)) < 5_000_000
    names_in(info, 3)
    image_size_of(read.get("image_size"))
    schedule = schedule_of(read["args"] | read["schedule"], HERE)
    state = named(read.get("ema") or read["model"], "denoiser")
    try:
        check_denoiser(state, False, schedule.num_train_timesteps)
    except (AttributeError, KeyError, RuntimeError, ValueError, IndexError) as error:
        raise CheckpointError(str(error)) from None  # as denoiser_of does


def test_ten_thousand_nearly_good_files() -> None:
    original = good()
    taken = 0
    for seed in range(10_000):
        draw = random.Random(seed)
        content = shallow(original)
        mutate(content, draw)
        try:
            use(content)
            taken += 1
        except LdmError as error:
            assert len(str(error)) < 2000 and str(error).isprintable(), (seed, str(error)[:300])
    assert 1000 < taken < 9000  # both happen


def shallow(value: Any) -> Any:
    """Dictionaries of their own, with the same tensors."""
    return {key: shallow(item) for key, item in value.items()} if isinstance(value, dict) else value


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in a pickle's text
@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "old"])
def test_files_with_wrong_bytes(old_format: bool) -> None:
    buffer = io.BytesIO()
    content = good()
    content["autoencoder"] = content["ema"] = None
    torch.save(content, buffer, _use_new_zipfile_serialization=not old_format)
    whole = buffer.getvalue()
    for seed in range(1000):
        draw = random.Random(seed)
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):  # the pickle is at the start, the zip directory at the end
            at = draw.choice([draw.randrange(len(data)), draw.randrange(min(3000, len(data))), -draw.randint(1, 500)])
            data[at] = draw.randrange(256)
        try:
            use(contents(Source(io.BytesIO(data), len(data), 10**8), HERE))
        except LdmError as error:
            assert len(str(error)) < 2000 and str(error).isprintable(), (seed, str(error)[:300])


def test_whole_openings_of_nearly_good_files(tmp_path: Path) -> None:
    original, path = good(), tmp_path / "a.pt"
    for seed in range(100):
        content = shallow(original)
        mutate(content, random.Random(seed))
        try:
            torch.save(copy.copy(content), path)
        except (RecursionError, RuntimeError, NotImplementedError, UnicodeEncodeError):
            continue  # not every mutation can be written
        try:
            loaded = checkpoint.load_diffusion(path)
            assert type(loaded.denoiser.num_classes) is int and loaded.class_names
        except LdmError as error:
            assert len(str(error)) < 2000 and str(error).isprintable(), (seed, str(error)[:300])


def test_every_schedule_that_is_taken_can_be_sampled() -> None:
    taken = 0
    for seed in range(400):
        draw = random.Random(seed)
        first, last = sorted(10 ** draw.uniform(-11, 0) for _ in range(2))
        try:
            schedule = NoiseSchedule(
                draw.choice([2, 3, 10, 1000, 5000]), first, last, draw.choice(["linear", "scaled_linear"])
            )
        except LdmError:
            continue
        taken += 1
        for sampler in SAMPLERS:
            steps = min(8, schedule.num_train_timesteps)
            plan = plan_of(schedule, SamplingConfig(sampler=sampler, num_inference_steps=steps), "v_prediction")
            assert all(math.isfinite(float(step.keep)) and math.isfinite(float(step.x0)) for step in plan)
    assert taken > 100
