"""Checkpoint files: the existing format as users have it, and the project's own."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ldm_ray.checkpoints import checkpoint
from ldm_ray.checkpoints.choose import load
from ldm_ray.data.images import decode_png, to_float
from ldm_ray.data.sources import load_source
from ldm_ray.data.statistics import LatentStatistics
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.engine.generator import Generator
from ldm_ray.models import registry
from ldm_ray.models.codec import LatentCodec
from ldm_ray.models.denoiser import Denoiser
from ldm_ray.settings.errors import CheckpointError
from tests.helpers.data import Shared


def state(kind: str = "mlp", latent_dim: int = 16) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(latent_dim)
        return dict(registry.build(kind, latent_dim).state_dict())


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def statistics(dim: int = 16) -> LatentStatistics:
    generator = torch.Generator().manual_seed(9)
    return LatentStatistics.of(torch.randn(200, dim, generator=generator) @ torch.randn(dim, dim, generator=generator))


@pytest.fixture
def diffusion_file(tmp_path: Path, ae_file: Path) -> Path:
    """A denoiser in the project's own format, with whitened latents."""
    autoencoder = checkpoint.load_autoencoder(ae_file)
    autoencoder = dataclasses.replace(autoencoder, codec=autoencoder.codec.with_statistics(statistics()))
    model, ema = Denoiser(hidden_dim=32), Denoiser(hidden_dim=32)
    for number, weight in enumerate(ema.parameters()):
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(number))
    content = checkpoint.diffusion_content(
        model,
        ema,
        NoiseSchedule(50, 1e-3, 0.1, "scaled_linear"),
        autoencoder,
        {"lr": 1e-3},
        epoch=7,
        training={"step": 3},
    )
    checkpoint.write(tmp_path / "run" / "latest.pt", content)
    return tmp_path / "run" / "latest.pt"


# --- the existing format: real files ---


@pytest.mark.parametrize(("kind", "wanted"), [("mlp", 0.163), ("conv", 0.111)])
def test_existing_autoencoders_reconstruct_mnist(shared: Shared, kind: str, wanted: float, tmp_path: Path) -> None:
    loaded = checkpoint.load_autoencoder(shared.checkpoints / f"ae-{kind}.pt")
    assert (loaded.codec.kind, loaded.codec.latent_dim, loaded.only_digit) == (kind, 16, None)
    source = load_source(str(shared.mnist), "test", tmp_path)
    encoded = source.table["image"].combine_chunks().field("bytes")[:500].to_pylist()
    images = to_float(torch.stack([torch.from_numpy(decode_png(data).copy()) for data in encoded]))[:, None]
    made = loaded.codec.decode(loaded.codec.encode(images))
    assert F.binary_cross_entropy(made, images).item() == pytest.approx(wanted, abs=0.012)


def test_existing_denoiser_makes_the_digits_it_is_asked_for(shared: Shared) -> None:
    loaded = checkpoint.load_diffusion(shared.checkpoints / "latent-diffusion.pt")
    assert loaded.autoencoder is None and loaded.schedule == NoiseSchedule(1000, 1e-4, 2e-2)
    assert loaded.denoiser.hidden_dim == 256 and not loaded.denoiser.training
    generator = Generator.open(shared.checkpoints / "latent-diffusion.pt", ae_ckpt=shared.checkpoints / "ae-mlp.pt")
    assert loaded.args["ae_model"] == "ae-mlp"
    assert isinstance(generator.codec, LatentCodec)
    assert torch.equal(generator.codec.colouring, torch.eye(16))  # existing denoisers work on raw latents
    images = generator([1, 2, 3, 4], [0, 1, 0, 1])
    assert images.shape == (4, 1, 28, 28) and images.dtype == torch.uint8
    ink = to_float(images).mean(dim=(1, 2, 3))
    assert 0.05 < ink.mean() < 0.25 and bool(
        ink[[0, 2]].mean() > 1.3 * ink[[1, 3]].mean()
    )  # MNIST: 0.13; a 0 has 2× a 1
    assert len({image.numpy().tobytes() for image in images}) == 4


def test_the_wrong_autoencoder_for_an_existing_denoiser_is_refused(shared: Shared) -> None:
    with pytest.raises(CheckpointError, match=r"is of type conv, but .* needs mlp"):
        checkpoint.load_diffusion(shared.checkpoints / "latent-diffusion.pt", shared.checkpoints / "ae-conv.pt")
    with pytest.raises(CheckpointError, match="carries no autoencoder: name the ae-mlp checkpoint"):
        Generator.open(shared.checkpoints / "latent-diffusion.pt")


def test_the_autoencoder_of_an_existing_denoiser_is_found(shared: Shared) -> None:
    generator = Generator.open(shared.checkpoints / "latent-diffusion.pt", search=[shared.checkpoints])
    assert generator.codec.kind == "mlp"


# --- the existing format: its varieties ---


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_prefixes_are_taken_off(tmp_path: Path, prefix: str, kind: str) -> None:
    weights = state(kind)
    content = {"model": {prefix + name: value for name, value in weights.items()}, "args": {"model": f"ae-{kind}"}}
    loaded = checkpoint.load_autoencoder(saved(tmp_path / "a.pt", content))
    assert loaded.codec.kind == kind
    assert all(torch.equal(value, weights[name]) for name, value in loaded.codec.model.state_dict().items())


def test_a_prefixed_denoiser_is_known_as_one(tmp_path: Path) -> None:
    weights = {f"_orig_mod.{name}": value for name, value in Denoiser(hidden_dim=16).state_dict().items()}
    loaded = checkpoint.load_diffusion(saved(tmp_path / "d.pt", {"model": weights}))
    assert loaded.denoiser.hidden_dim == 16 and loaded.schedule == NoiseSchedule()


@pytest.mark.parametrize("name", ["mlp", "conv", "ae-mlp", "ae-conv"])
def test_namespace_arguments(tmp_path: Path, name: str) -> None:
    args = argparse.Namespace(model=name, latent_dim=16, only_digit=7, outdir=pathlib.PurePosixPath("/o"))
    path = saved(tmp_path / "a.pt", {"model": state(name[-4:].strip("-")), "args": args, "epoch": 4})
    loaded = checkpoint.load_autoencoder(path)
    assert f"ae-{loaded.codec.kind}".endswith(name) and loaded.only_digit == 7
    assert loaded.info["args"]["outdir"] == "/o" and loaded.info["epoch"] == 4


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_without_arguments_the_type_is_detected(tmp_path: Path, kind: str) -> None:
    loaded = checkpoint.load_autoencoder(saved(tmp_path / "a.pt", {"model": state(kind, 5)}))
    assert (loaded.codec.kind, loaded.codec.latent_dim) == (kind, 5)


def test_the_older_torch_format_is_read(tmp_path: Path) -> None:
    torch.save({"model": state()}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert checkpoint.load_autoencoder(tmp_path / "a.pt").codec.kind == "mlp"


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("name", ["PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"])
def test_paths_of_every_system_and_python_are_text(tmp_path: Path, module: str, name: str) -> None:
    """The pickle that another system or Python writes, made by renaming the class in one written here."""
    pure = pathlib.PureWindowsPath("C:\\runs\\x") if "Windows" in name else pathlib.PurePosixPath("/runs/x")
    source = saved(tmp_path / "source.pt", {"model": state(), "exp_name": pure})
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("/data.pkl"):
                data, found = re.subn(rb"cpathlib[\w.]*\nPure\w+Path\n", f"c{module}\n{name}\n".encode(), data)
                assert found == 1
            new.writestr(entry.filename, data)
    assert checkpoint.load_autoencoder(tmp_path / "a.pt").info["exp_name"] == str(pure)


# --- the project's own format ---


def test_own_autoencoder_round_trip(tmp_path: Path) -> None:
    model, known = registry.build("conv", 8), statistics(8)
    content = checkpoint.autoencoder_content(
        model, "conv", {"lr": 0.01, "only_digit": 3}, epoch=2,
        statistics={"mean": known.mean, "covariance": known.covariance},
    )  # fmt: skip
    checkpoint.write(tmp_path / "a.pt", content)
    loaded = checkpoint.load_autoencoder(tmp_path / "a.pt")
    assert (loaded.codec.kind, loaded.codec.latent_dim, loaded.only_digit) == ("conv", 8, 3)
    assert torch.equal(loaded.codec.statistics.covariance, known.covariance)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.codec.model.state_dict().items())
    assert loaded.info["epoch"] == 2 and loaded.info["config"] == {"lr": 0.01, "only_digit": 3}
    assert loaded.sha256 == checkpoint.file_sha256(tmp_path / "a.pt")


def test_a_checkpoint_is_opened_once(
    diffusion_file: Path, ae_file: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    as_before = Path.open

    def noting(self: Path, *args: Any, **rest: Any) -> Any:
        opened.append(self)
        return as_before(self, *args, **rest)

    monkeypatch.setattr(Path, "open", noting)
    for file in diffusion_file, ae_file:
        loaded = checkpoint.load(file)
        assert opened == [file] and loaded.kind in ("latent_diffusion", "autoencoder")
        opened.clear()
    own = load(shared.checkpoints / "latent-diffusion.pt", shared.checkpoints / "ae-mlp.pt")
    assert [path.name for path in opened] == ["latent-diffusion.pt", "ae-mlp.pt"] and own.codec is not None


def test_the_hash_is_of_the_bytes_that_were_read(diffusion_file: Path, ae_file: Path) -> None:
    before = checkpoint.file_sha256(diffusion_file)
    with checkpoint.opened(diffusion_file) as file:
        checkpoint.write(diffusion_file, checkpoint.read(ae_file)[0])  # as a training does
        assert file.source.sha256() == before != checkpoint.file_sha256(diffusion_file)


def test_own_denoiser_carries_everything(diffusion_file: Path, ae_file: Path) -> None:
    loaded = checkpoint.load_diffusion(diffusion_file)
    content = torch.load(diffusion_file, weights_only=True)  # plain torch, nothing allowed
    assert content["kind"] == "latent_diffusion" and content["epoch"] == 7 and content["training"] == {"step": 3}
    assert loaded.schedule == NoiseSchedule(50, 1e-3, 0.1, "scaled_linear")
    ours = loaded.denoiser.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in content["ema"].items())
    assert not torch.equal(content["model"]["out_proj.weight"], content["ema"]["out_proj.weight"])
    assert loaded.autoencoder is not None
    original = checkpoint.load_autoencoder(ae_file)
    assert (loaded.autoencoder.sha256, loaded.autoencoder.path) == (original.sha256, str(ae_file))
    assert torch.equal(loaded.autoencoder.codec.statistics.covariance, statistics().covariance)
    images = torch.rand(4, 1, 28, 28)
    wanted = original.codec.with_statistics(statistics()).encode(images)
    assert torch.equal(loaded.autoencoder.codec.encode(images), wanted)
    assert {"model", "args", "epoch"} <= set(content) and content["args"]["ae_model"] == "ae-mlp"


def test_own_autoencoder_opens_with_plain_torch(ae_file: Path) -> None:
    content = torch.load(ae_file, weights_only=True)
    assert content["args"]["model"] == "mlp" and content["args"]["latent_dim"] == 16 and content["format_version"] == 1


def test_another_autoencoder_shows_both_hashes(diffusion_file: Path, ae_file: Path, tmp_path: Path) -> None:
    weights = {name: value + 0.25 for name, value in state().items()}
    other = saved(tmp_path / "other.pt", {"model": weights})
    hashes = checkpoint.file_sha256(other), checkpoint.file_sha256(ae_file)
    with pytest.raises(CheckpointError, match=f"{hashes[0]}.*{hashes[1]}.*--force"):
        checkpoint.load_diffusion(diffusion_file, other)
    forced = checkpoint.load_diffusion(diffusion_file, other, force=True).autoencoder
    assert forced is not None and forced.sha256 == hashes[0]
    assert torch.equal(forced.codec.statistics.covariance, statistics().covariance)
    assert torch.equal(forced.codec.model.state_dict()["encoder.net.1.bias"], weights["encoder.net.1.bias"])
    same = checkpoint.load_diffusion(diffusion_file, ae_file).autoencoder
    assert same is not None and same.sha256 == hashes[1]


def test_an_autoencoder_of_another_size_is_refused(diffusion_file: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other.pt", {"model": state("mlp", 8)})
    with pytest.raises(CheckpointError, match=r"denoises 16 numbers.*makes 8"):
        checkpoint.load_diffusion(diffusion_file, other, force=True)


def test_the_kinds_are_not_mistaken(diffusion_file: Path, ae_file: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a denoiser, not an autoencoder"):
        checkpoint.load_autoencoder(diffusion_file)
    with pytest.raises(CheckpointError, match="holds an autoencoder, not a denoiser"):
        checkpoint.load_diffusion(ae_file)


def test_the_same_content_is_the_same_bytes_under_any_name(tmp_path: Path) -> None:
    content = {"model": state(), "args": {"model": "mlp"}}
    for path in (tmp_path / "latest.pt", tmp_path / "deep" / "checkpoint_epoch_000001.pt"):
        checkpoint.write(path, content)
    assert (tmp_path / "latest.pt").read_bytes() == (tmp_path / "deep" / "checkpoint_epoch_000001.pt").read_bytes()


def test_a_write_that_fails_leaves_the_old_file(ae_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "latest.pt"
    path.write_bytes(ae_file.read_bytes())
    with pytest.raises(Exception, match=r"(?i)pickle"):
        checkpoint.write(path, {"model": state(), "bad": lambda: None})
    assert path.read_bytes() == ae_file.read_bytes() and os.listdir(tmp_path) == ["latest.pt"]
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(OSError):
        checkpoint.write(tmp_path / "folder.pt", {"model": state()})
    assert sorted(os.listdir(tmp_path)) == ["folder.pt", "latest.pt"]


def test_generated_images_do_not_depend_on_their_batch(diffusion_file: Path) -> None:
    generator = Generator.open(diffusion_file)
    together = generator([5, 6, 7, 6], [1, None, 3, 4])
    assert together[1].numpy().tobytes() == generator([6], [None])[0].numpy().tobytes()
    assert together[[2, 0]].numpy().tobytes() == generator([7, 5], [3, 1]).numpy().tobytes()
    assert not torch.equal(together[1], together[3])  # the label matters
