"""Autoencoders, codec, denoiser and registry: names, sizes, identities, frozenness."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm_ray.data.statistics import LatentStatistics
from ldm_ray.engine.tabled import TabledDenoiser
from ldm_ray.models import registry
from ldm_ray.models.autoencoders import MLPAutoencoder
from ldm_ray.models.codec import LatentCodec
from ldm_ray.models.denoiser import Denoiser, FiLMLayer
from ldm_ray.settings.errors import CheckpointError

MLP_KEYS = [f"encoder.net.{i}" for i in (1, 3, 5, 7)] + [f"decoder.core.{i}" for i in (0, 2, 4, 6)]
CONV_KEYS = [
    *(f"encoder.conv.{i}" for i in (0, 2, 4)),
    *("encoder.fc.1", "encoder.fc.3", "decoder.fc.0", "decoder.fc.2"),
    *("decoder.conv4.0", "decoder.conv7.0", "decoder.conv14.0", "decoder.conv28"),
]
DENOISER_KEYS = [
    *("time.fc1", "time.fc2", "in_proj", "out_norm", "out_proj"),
    *(f"b{i}{half}.{part}" for i in range(1, 5) for half in "ab" for part in ("norm", "proj", "fc")),
]


def with_both(names: list[str]) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "names"), [("mlp", MLP_KEYS), ("conv", CONV_KEYS)])
def test_autoencoder_names_are_the_file_format(kind: str, names: list[str]) -> None:
    model = registry.build(kind, 16)
    assert set(model.state_dict()) == with_both(names)


def test_autoencoder_sizes() -> None:
    widths = [784, 512, 256, 128, 16, 128, 256, 512, 784]
    assert count(registry.build("mlp", 16)) == sum(a * b + b for a, b in itertools.pairwise(widths))
    shapes = {name: tuple(value.shape) for name, value in registry.build("conv", 16).state_dict().items()}
    assert shapes["encoder.fc.1.weight"] == (128, 2048) and shapes["encoder.fc.3.weight"] == (16, 128)
    assert shapes["decoder.fc.0.weight"] == (128, 16) and shapes["decoder.fc.2.weight"] == (2048, 128)
    kernels = {"encoder.conv.0": (32, 1), "encoder.conv.2": (64, 32), "encoder.conv.4": (128, 64)}
    kernels |= {"decoder.conv4.0": (128, 128), "decoder.conv7.0": (64, 128), "decoder.conv14.0": (32, 64)}
    kernels |= {"decoder.conv28": (1, 32)}
    assert {name: shapes[f"{name}.weight"] for name in kernels} == {name: (*k, 3, 3) for name, k in kernels.items()}


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("latent_dim", [1, 16, 33])
def test_autoencoder_shapes_and_range(kind: str, latent_dim: int, images: torch.Tensor) -> None:
    model = registry.build(kind, latent_dim)
    assert model.encoder(images).shape == (64, latent_dim)
    made = model(images)
    assert made.shape == images.shape and made.min() >= 0 and made.max() <= 1
    torch.testing.assert_close(made, model.logits(images).sigmoid())


def test_conv_decoder_resizes_by_nearest_neighbour() -> None:
    """The enlargement of each resize, written out by indexing."""
    decoder = registry.build("conv", 16).decoder
    latents = torch.randn(3, 16)
    h = decoder.conv4(decoder.fc(latents).view(-1, 128, 4, 4))
    for name, size in (("conv7", 7), ("conv14", 14), ("conv28", 28)):
        rows = torch.arange(size) * h.shape[-1] // size
        h = getattr(decoder, name)(h[:, :, rows][:, :, :, rows])
    torch.testing.assert_close(decoder(latents), h)


def test_denoiser_names_and_parameter_count() -> None:
    model = Denoiser()
    assert set(model.state_dict()) == with_both(DENOISER_KEYS) | {"class_emb.weight"}
    assert count(model) == 1_693_456
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["time.fc1.weight"] == (256, 128) and shapes["class_emb.weight"] == (10, 256)
    assert shapes["b3a.proj.weight"] == (512, 256) and shapes["out_proj.weight"] == (16, 256)


def test_film_is_the_identity_at_the_start_and_its_formula_after() -> None:
    layer = FiLMLayer(32, 8)
    x, e = torch.randn(5, 32), torch.randn(5, 8)
    torch.testing.assert_close(layer(x, e), layer.fc(F.silu(layer.norm(x))))
    nn.init.normal_(layer.proj.weight)
    nn.init.normal_(layer.proj.bias)
    affine = e @ layer.proj.weight.T + layer.proj.bias
    gamma, beta = affine[:, :32], affine[:, 32:]
    normed = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x, e), layer.fc(F.silu((1 + gamma) * normed + beta)), rtol=1e-4, atol=1e-5)


def awake(model: Denoiser) -> Denoiser:
    """Random numbers where the initial weights are zero, so that every input matters."""
    for name, weight in model.named_parameters():
        if "proj" in name:
            nn.init.normal_(weight, std=0.3)
    return model.eval()


def test_fresh_denoiser_predicts_zero_and_conditioning_matters_later() -> None:
    model = Denoiser()
    x, t, labels = torch.randn(6, 16), torch.tensor([0, 1, 500, 998, 999, 3]), torch.tensor([0, 1, 5, 9, 10, 3])
    assert model(x, t, labels).shape == (6, 16) and not model(x, t, labels).any()
    awake(model)
    out = model(x, t, labels)
    assert not torch.allclose(out, model(x, t.flip(0), labels)) and not torch.allclose(out, model(x, t, labels * 0))


def test_the_null_label_adds_nothing_for_the_class() -> None:
    model = awake(Denoiser(hidden_dim=32))
    x, t = torch.randn(4, 16), torch.arange(4)
    null = torch.full((4,), model.null_label)
    assert torch.equal(model(x, t, null), model(x, t, None))
    torch.testing.assert_close(model.embed(t, torch.tensor([3] * 4)), model.time(t) + model.class_emb.weight[3])


def test_denoiser_is_rebuilt_from_its_state() -> None:
    model = awake(Denoiser(latent_dim=7, hidden_dim=24, num_classes=4, embedding_dim=40, sinusoid_dim=12))
    again = Denoiser.from_state(model.state_dict())
    x, t, labels = torch.randn(3, 7), torch.tensor([0, 10, 99]), torch.tensor([0, 3, 4])
    assert torch.equal(again(x, t, labels), model(x, t, labels)) and again.null_label == 4
    broken = model.state_dict() | {"b2a.fc.weight": torch.zeros(24, 23)}
    with pytest.raises(RuntimeError, match=r"b2a\.fc\.weight"):
        Denoiser.from_state(broken)


@pytest.mark.parametrize("num_blocks", [1, 2, 11])
def test_the_number_of_blocks_is_read_from_the_state(num_blocks: int) -> None:
    model = awake(Denoiser(hidden_dim=24, num_blocks=num_blocks)).eval()
    again = Denoiser.from_state(model.state_dict()).eval()
    assert again.num_blocks == num_blocks
    xt, t, labels = torch.randn(5, 16), torch.tensor([0, 1, 50, 99, 3]), torch.tensor([0, 3, 4, 10, 9])
    with torch.no_grad():
        assert torch.equal(again(xt, t, labels), model(xt, t, labels))
    torch.testing.assert_close(TabledDenoiser(again, 100)(xt, t, labels), again(xt, t, labels), rtol=0, atol=1e-5)
    for part in ("b1b", "b"):  # a half of a block, and all of them
        missing = {name: value for name, value in model.state_dict().items() if not name.startswith(part)}
        with pytest.raises(RuntimeError, match="b1b"):
            Denoiser.from_state(missing)


def correlated(number: int, dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(number, dim, generator=generator) @ torch.randn(dim, dim, generator=generator) + 3


def test_whitening_gives_zero_mean_and_identity_covariance() -> None:
    raw = correlated(5000, 16)
    codec = LatentCodec(MLPAutoencoder(16), "mlp", LatentStatistics.of(raw))
    white = codec.whiten(raw).double()
    torch.testing.assert_close(white.mean(0), torch.zeros(16, dtype=torch.float64), rtol=0, atol=1e-3)
    torch.testing.assert_close(white.T.cov(), torch.eye(16, dtype=torch.float64), rtol=0, atol=5e-3)


def test_statistics_are_numpys_and_their_maps_inverse() -> None:
    raw = correlated(300, 6)
    statistics = LatentStatistics.of(raw)
    torch.testing.assert_close(statistics.mean, raw.double().mean(0))
    torch.testing.assert_close(statistics.covariance, raw.double().T.cov())
    whitening, colouring = statistics.maps()
    torch.testing.assert_close(whitening @ colouring, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(colouring @ colouring, statistics.covariance)
    torch.testing.assert_close(whitening, whitening.T)


def test_a_dead_latent_dimension_stays_finite() -> None:
    raw = correlated(300, 6)
    raw[:, 2] = 1.0
    codec = LatentCodec(MLPAutoencoder(6), "mlp", LatentStatistics.of(raw))
    assert bool(codec.whiten(raw).isfinite().all()) and bool(codec.decode(codec.whiten(raw)).isfinite().all())


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_decoding_what_was_encoded_is_the_autoencoder(kind: str, images: torch.Tensor) -> None:
    model = registry.build(kind, 16)
    raw = model.encoder(images).detach()
    plain = LatentCodec(model, kind)
    assert torch.equal(plain.encode(images), raw)  # identity statistics change nothing
    whitened = plain.with_statistics(LatentStatistics.of(raw))
    assert not torch.allclose(whitened.encode(images), raw, atol=0.1)
    torch.testing.assert_close(whitened.decode(whitened.encode(images)), model(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_the_codec_is_frozen(kind: str, images: torch.Tensor) -> None:
    codec = LatentCodec(registry.build(kind, 16), kind)
    before = {name: value.clone() for name, value in codec.model.state_dict().items()}
    codec.train()
    assert not any(module.training for module in codec.modules())
    latents = codec.encode(images)
    assert not latents.requires_grad and not codec.decode(latents.requires_grad_()).requires_grad
    assert not any(p.requires_grad for p in codec.parameters())
    after = codec.model.state_dict()
    assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before)
    assert list(before) == list(after) and not any(key.startswith(("mean", "whiten")) for key in codec.state_dict())


def test_a_new_type_is_one_class_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))

    @registry.register("linear", latent_key="encoder.weight")
    class Linear(nn.Module):
        image_size = (28, 28)

        def __init__(self, latent_dim: int) -> None:
            super().__init__()
            self.latent_dim = latent_dim
            self.encoder, self.decoder = nn.Linear(784, latent_dim), nn.Linear(latent_dim, 784)

    state = registry.build("linear", 5).state_dict()
    assert registry.detect(state, {}) == ("linear", 5)
    assert registry.detect(state, {"model": "ae-linear", "latent_dim": 5}) == ("linear", 5)
    assert LatentCodec.from_state("linear", 5, state).latent_dim == 5
    with pytest.raises(ValueError, match="registered already"):
        registry.register("linear", latent_key="encoder.weight")(Linear)


def test_detection_order_and_refusals() -> None:
    assert list(registry.REGISTRY) == ["conv", "mlp"]  # discovery: Conv first
    for kind in registry.REGISTRY:
        state = registry.build(kind, 16).state_dict()
        other = "mlp" if kind == "conv" else "conv"
        for said in ({}, {"model": kind}, {"model": f"ae-{kind}", "latent_dim": 16}):
            assert registry.detect(state, said) == (kind, 16)
        with pytest.raises(CheckpointError, match=f"'{other}'.*'{kind}'"):
            registry.detect(state, {"model": f"ae-{other}"})
        with pytest.raises(CheckpointError, match=r"latent_dim 8.*have 16"):
            registry.detect(state, {"latent_dim": 8})
    for refuse in (lambda: registry.detect({}, {"model": "vae"}), lambda: registry.build("vae", 16)):
        with pytest.raises(CheckpointError, match="'vae' is unknown; registered are conv, mlp"):
            refuse()
    with pytest.raises(CheckpointError, match="fit no registered autoencoder"):
        registry.detect({"some.weight": torch.zeros(1)}, {})
