"""The engine: tables instead of conditioning, noise per image, the same bytes in any company."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_ray.checkpoints import checkpoint
from ldm_ray.checkpoints.checkpoint import load_autoencoder
from ldm_ray.diffusion.noise import ImageNoise, gaussian, philox, words
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.engine import tabled
from ldm_ray.engine.generator import Generator
from ldm_ray.engine.tabled import TabledDenoiser
from ldm_ray.engine.tiles import Tiles, single_threaded
from ldm_ray.models import registry
from ldm_ray.models.codec import LatentCodec
from ldm_ray.models.denoiser import Denoiser
from ldm_ray.settings.errors import CheckpointError, ConfigError
from ldm_ray.settings.sampling import SamplingConfig
from tests.helpers.networks import busy_denoiser

SCHEDULE = NoiseSchedule()
WAYS = [
    SamplingConfig(),
    SamplingConfig(sampler="unipc", guidance_scale=2.5, num_inference_steps=5),
    SamplingConfig(sampler="dpmpp_2m", guidance_start=0.0, num_inference_steps=5),
    SamplingConfig(sampler="ddpm", num_inference_steps=40),
    SamplingConfig(sampler="ddim", num_inference_steps=8, eta=0.5, guidance_scale=0.0),
]


# --- the table ---


@pytest.mark.parametrize("hidden_dim", [256, 40])
def test_the_table_is_the_denoiser(hidden_dim: int) -> None:
    denoiser = busy_denoiser(hidden_dim)
    tabled = TabledDenoiser(denoiser, 1000)
    random_ = torch.Generator().manual_seed(1)
    xt = torch.randn(500, 16, generator=random_) * 3
    t, labels = torch.randint(0, 1000, (500,), generator=random_), torch.arange(500) % 11
    with torch.no_grad():
        wanted = denoiser(xt, t, labels)
    assert wanted.std() > 0.05
    torch.testing.assert_close(tabled(xt, t, labels), wanted, rtol=0, atol=1e-5)


def test_one_shared_timestep_gives_the_bits_of_mixed_ones() -> None:
    tabled, xt, labels = TabledDenoiser(busy_denoiser(), 1000), torch.randn(64, 16), torch.arange(64) % 11
    for t in (0, 77, 999):
        assert torch.equal(tabled(xt, torch.tensor(t).expand(64), labels), tabled(xt, torch.full((64,), t), labels))


@pytest.mark.parametrize("error", [RuntimeError("no TorchScript in this version"), AttributeError("trace")])
def test_without_torchscript_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    denoiser, random_ = busy_denoiser(), torch.Generator().manual_seed(2)
    graph = TabledDenoiser(denoiser, 1000)
    assert isinstance(graph.one_timestep, torch.jit.ScriptFunction), "the fast path is not taken on this machine"

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch.jit, "trace", refuse)
    monkeypatch.setattr(tabled, "graphs", {})
    plain = TabledDenoiser(denoiser, 1000)
    assert plain.one_timestep is tabled.one_timestep and plain.several_timesteps is tabled.several_timesteps
    for count in (1, 4, 33, 256):
        xt = torch.randn(count, 16, generator=random_) * 3
        t, labels = torch.randint(0, 1000, (count,), generator=random_), torch.arange(count) % 11
        for timesteps in (t, t[:1].expand(count)):
            assert torch.equal(graph(xt, timesteps, labels), plain(xt, timesteps, labels))


def test_bf16_is_near_fp32_and_leaves_it_alone() -> None:
    denoiser, random_ = busy_denoiser(), torch.Generator().manual_seed(2)
    tabled = TabledDenoiser(denoiser, 1000)
    half = tabled.in_bf16()
    xt = torch.randn(256, 16, generator=random_) * 3
    t, labels = torch.randint(0, 1000, (256,), generator=random_), torch.arange(256) % 11
    with torch.no_grad():
        wanted = denoiser(xt, t, labels)
    for timesteps in (t, t[:1].expand(256)):
        exact, near = tabled(xt, timesteps, labels), half(xt, timesteps, labels)
        assert near.dtype == torch.float32 and 0 < (near - exact).norm() / exact.norm() < 0.01
        assert torch.equal(half(xt, t[:1].expand(256), labels), half(xt, t[:1].repeat(256), labels))
    torch.testing.assert_close(tabled(xt, t, labels), wanted, rtol=0, atol=1e-5)


def test_a_graph_of_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.jit, "trace", lambda function, *_, **__: lambda *given: function(*given) * (1 + 1e-6))
    monkeypatch.setattr(tabled, "graphs", {})
    assert TabledDenoiser(busy_denoiser(40), 10).one_timestep is tabled.one_timestep


def test_graphs_hold_no_weights() -> None:
    """A training run makes a denoiser's tables for each picture: two of one shape share a graph."""
    first, second = TabledDenoiser(busy_denoiser(48), 10), TabledDenoiser(Denoiser(16, 48).eval(), 10)
    assert first.one_timestep is second.one_timestep
    assert "<Tensor>" not in str(first.one_timestep.graph) + str(first.several_timesteps.graph)
    xt, t = torch.randn(5, 16), torch.full((5,), 3)
    assert first(xt, t, t).any() and not second(xt, t, t).any()  # an untrained network gives 0


# --- noise ---


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1, 2**62 + 3])
def test_philox_is_numpys_word_for_word(seed: int) -> None:
    wanted = np.random.Philox(key=seed).random_raw(4000)
    made = philox(torch.tensor([seed]), torch.arange(1000)).flatten().numpy().view(np.uint64)
    np.testing.assert_array_equal(made, wanted)
    for first, count in ((0, 5), (3, 60), (900, 100)):  # vectorised, and from numpy
        part = words(torch.tensor([seed, 1]), first, count)[0].numpy().view(np.uint64)
        np.testing.assert_array_equal(part, wanted[4 * first : 4 * (first + count)])


def test_noise_is_gaussian_and_uncorrelated() -> None:
    drawn = gaussian(torch.arange(4000), 0, 16, steps=2).double()  # (2, 4000, 16)
    flat = drawn.flatten()
    five = 5 / len(flat) ** 0.5
    assert abs(flat.mean()) < five and abs(flat.var() - 1) < 2**0.5 * five
    assert abs((flat**3).mean()) < 15**0.5 * five and abs((flat**4).mean() - 3) < 96**0.5 * five
    columns = drawn.permute(1, 0, 2).flatten(1)  # (4000, 32): all numbers of a seed
    assert (columns.T.corrcoef() - torch.eye(32)).abs().max() < 5.5 / 4000**0.5


@pytest.mark.parametrize("dim", [16, 3, 9])
def test_noise_does_not_depend_on_its_batch(dim: int) -> None:
    seeds = torch.tensor([7, 8, 2**32 - 1])
    batch, alone, other = ImageNoise(seeds, dim), ImageNoise(seeds[1:2], dim, 5), ImageNoise(seeds[[1, 0]], dim, 1)
    for step in [*range(150), 3]:
        wanted = batch(step)
        assert wanted.shape == (3, dim) and wanted.dtype == torch.float32
        assert torch.equal(wanted[1], alone(step)[0]) and torch.equal(wanted[[1, 0]], other(step))
    assert not torch.equal(batch(1), batch(2))


# --- bytes ---


def digest(image: torch.Tensor) -> str:
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()


BF16 = SamplingConfig(precision="bf16")


@pytest.mark.parametrize("sampling", [*WAYS, BF16], ids=lambda s: f"{s.sampler}-{s.guidance_scale:g}-{s.precision}")
def test_an_image_has_the_same_bytes_in_any_company(generator: Generator, sampling: SamplingConfig) -> None:
    rng = random.Random(1)
    wishes = [(rng.randrange(2**32), rng.choice([None, *range(10)])) for _ in range(600)]
    images = generator([seed for seed, _ in wishes], [label for _, label in wishes], sampling)
    wanted = {wish: digest(image) for wish, image in zip(wishes, images, strict=True)}
    assert len(set(wanted.values())) == len(wishes)
    for size in (1, 1, 2, 15, 16, 17, 33, 100, 300):
        some = rng.sample(wishes, size)
        made = generator([seed for seed, _ in some], [label for _, label in some], sampling)
        assert [digest(image) for image in made] == [wanted[wish] for wish in some]


def test_bytes_do_not_depend_on_the_number_of_threads(generator: Generator) -> None:
    seeds, labels = list(range(70)), [i % 10 for i in range(70)]
    wanted, in_bf16 = generator(seeds, labels), generator(seeds, labels, BF16)
    assert not torch.equal(generator.latents(seeds, labels), generator.latents(seeds, labels, BF16))
    assert generator.fingerprint != generator.fingerprint_in("bf16")
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            again = Generator(busy_denoiser(), generator.codec, SCHEDULE)
            assert again.tiles.threads == threads and torch.equal(again(seeds, labels), wanted)
            assert torch.equal(again(seeds, labels, BF16), in_bf16)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_bytes_follow_label_seed_and_settings(generator: Generator) -> None:
    wanted = digest(generator([5], [3])[0])
    others = [
        generator([6], [3]),
        generator([5], [4]),
        generator([5], [None]),
        *(generator([5], [3], way) for way in WAYS[1:]),
    ]
    assert wanted not in {digest(other[0]) for other in others}


def test_unequal_sizes_are_not_used() -> None:
    """A computation whose bits depend on the number of rows, as some matrix libraries' do."""

    def rows_matter(latents: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        return [latents * (1 + 1e-7 * (len(latents) in (8, 16, 64)))]

    tiles = Tiles(rows_matter, 16, torch.device("cpu"))
    tiles.threads = 1
    assert [tiles.size_for(count) for count in (1, 5, 16, 17, 40, 100, 1000)] == [4, 32, 32, 32, 128, 128, 256]
    tiles.threads = 2
    assert [tiles.size_for(count) for count in (4, 8, 16, 32, 64, 100, 1000)] == [4, 32, 32, 32, 32, 128, 256]


def test_threads_are_restored_also_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), single_threaded(), single_threaded():
        assert torch.get_num_threads() == 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before


# --- what callers can do ---


def test_ddpm_over_all_timesteps_is_the_straightforward_loop() -> None:
    """Ancestral sampling written out over the network as it was trained (DDPM, algorithm 2), on the same noise."""
    denoiser = busy_denoiser()
    codec = LatentCodec(registry.build("mlp", 16), "mlp")
    made = Generator(denoiser, codec, SCHEDULE).latents([1, 2, 3], [7, 7, None], SamplingConfig(sampler="ddpm"))
    noise = ImageNoise(torch.tensor([1, 2, 3]), 16)
    betas, alpha_bar = SCHEDULE.betas, SCHEDULE.alphas_cumprod
    labels, x = torch.tensor([7, 7, 10]), noise(0)
    for i, t in enumerate(range(999, -1, -1)):
        with torch.no_grad():
            eps = denoiser(x, torch.full((3,), t), labels)
        x = (x - betas[t] / (1 - alpha_bar[t]).sqrt() * eps) / (1 - betas[t]).sqrt()
        if t:
            posterior = betas[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
            x = x + posterior.sqrt() * noise(i + 1)
        x = x.float()
    torch.testing.assert_close(made, x, rtol=1e-4, atol=1e-4)


def test_guidance_of_one_is_no_guidance_and_none_is_unconditional(generator: Generator) -> None:
    labels: list[int | None] = [1, 2, None, 4]
    plain = generator.latents([1, 2, 3, 4], labels, SamplingConfig(guidance_scale=1.0))
    null = generator.latents([1, 2, 3, 4], [None] * 4)
    off = generator.latents([1, 2, 3, 4], labels, SamplingConfig(guidance_scale=0.0, guidance_start=0.0))
    torch.testing.assert_close(off, null, rtol=0, atol=1e-4)
    assert not torch.allclose(plain, null, atol=1e-2)
    images = generator([1, 2, 3, 4], labels, SamplingConfig(guidance_scale=1.0))
    assert torch.equal(generator.decode(plain), images)


def test_guidance_sets_in_after_its_start(generator: Generator) -> None:
    """Up to there the images are those without; which step is the first goes by the share that is behind its middle."""

    def x0(scale: float, steps: int, start: float) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        sampling = SamplingConfig(num_inference_steps=steps, guidance_scale=scale, guidance_start=start)
        generator([5, 6], [1, 2], sampling, watch=lambda first, step, x0_pred: seen.append(x0_pred.clone()))
        return seen

    for steps, start, first in ((8, 0.85, 7), (12, 0.85, 10), (20, 0.85, 17), (1, 0.85, 0), (4, 0.5, 2), (3, 0.0, 0)):
        same = [torch.equal(a, b) for a, b in zip(x0(1.0, steps, start), x0(3.0, steps, start), strict=True)]
        assert same == [i < first for i in range(steps)], (steps, start)


def test_steps_can_be_watched(generator: Generator) -> None:
    seen: dict[int, list[int]] = {}

    def watch(first: int, step: int, x0_pred: torch.Tensor) -> None:
        assert x0_pred.shape == (min(32, 40 - first), 16)
        seen.setdefault(first, []).append(step)

    generator(range(40), [1] * 40, SamplingConfig(num_inference_steps=6), watch)
    assert seen == {0: list(range(6)), 32: list(range(6))}


def test_a_result_that_is_not_finite_is_told_and_touches_no_other() -> None:
    denoiser = busy_denoiser()
    with torch.no_grad():
        denoiser.class_emb.weight[3] = 1e38  # overflows for this class alone
    codec = LatentCodec(registry.build("mlp", 16), "mlp")
    generator = Generator(denoiser, codec, SCHEDULE)
    images, finite = generator.make([1, 2, 3], [1, 3, 5])
    assert finite.tolist() == [True, False, True]
    assert torch.equal(images[[0, 2]], generator([1, 3], [1, 5]))
    with pytest.raises(CheckpointError, match=r"1 of 3 images .* not finite \(seeds 2\)"):
        generator([1, 2, 3], [1, 3, 5])


@pytest.mark.parametrize(
    ("seeds", "labels", "said"),
    [
        ([], [], "0 seeds and 0 labels"),
        ([1, 2], [1], "2 seeds and 1 labels"),
        ([-1], [1], "a seed is 0 to 4294967295"),
        ([2**64], [1], "a seed is 0 to 4294967295"),
        ([1], [10], "label 10 is outside 0 to 9"),
        ([1], [-1], "label -1 is outside 0 to 9"),
    ],
)
def test_impossible_wishes_get_one_line(generator: Generator, seeds: list[int], labels: list[int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        generator(seeds, labels)


def test_more_steps_than_timesteps_are_refused(generator: Generator) -> None:
    with pytest.raises(ConfigError, match="1001 inference steps: this model has 1000 timesteps"):
        generator([1], [1], SamplingConfig(num_inference_steps=1001))


def test_prediction_types_are_read_from_the_checkpoint(ae_file: Path, tmp_path: Path) -> None:
    denoiser, path = busy_denoiser(), tmp_path / "d.pt"
    content = checkpoint.diffusion_content(denoiser, denoiser, SCHEDULE, load_autoencoder(ae_file), {})
    made = {}
    for kind in ("epsilon", "v_prediction", "sample"):
        checkpoint.write(path, content | {"prediction_type": kind})
        made[kind] = Generator.open(path).latents([1], [1])
        assert bool(torch.isfinite(made[kind]).all())
    assert len({tuple(value.flatten().tolist()) for value in made.values()}) == 3
    checkpoint.write(path, content | {"prediction_type": "score"})
    with pytest.raises(CheckpointError, match=r"prediction_type' must be one of epsilon, .*not 'score'"):
        Generator.open(path)


def test_the_fingerprint_is_short_and_stays(generator: Generator) -> None:
    assert len(generator.fingerprint) == 12 and generator.fingerprint == generator.fingerprint
