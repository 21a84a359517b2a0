"""Paths, planes and maps of a latent space, and the two commands that show them."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_ray import explore, tsne
from ldm_ray.checkpoints import checkpoint
from ldm_ray.data.images import grid
from ldm_ray.data.statistics import LatentStatistics
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.engine.generator import Generator
from ldm_ray.latents import maps, sheets
from ldm_ray.latents.labels import GAP, GROUND, HEAD, LONGEST, labelled
from ldm_ray.latents.paths import interpolate, plane, traverse
from ldm_ray.models import registry
from ldm_ray.models.codec import LatentCodec
from ldm_ray.settings.errors import CheckpointError, ConfigError
from ldm_ray.settings.latents import TsneConfig
from ldm_ray.settings.sampling import SamplingConfig
from tests.helpers.networks import busy_denoiser

# --- paths ---


def test_a_spherical_path_turns_evenly_and_keeps_the_length() -> None:
    a, b = torch.tensor([3.0, 0, 0]), torch.tensor([0, 3.0, 0])
    path = interpolate(a, b, 7)
    angles = torch.arange(7) * math.pi / 12
    torch.testing.assert_close(path, 3 * torch.stack([angles.cos(), angles.sin(), torch.zeros(7)], dim=1))
    longer = interpolate(a, 4 * b, 5)
    torch.testing.assert_close(longer[[0, -1]], torch.stack([a, 4 * b]))
    assert bool((longer.norm(dim=1).diff() > 0).all())


def test_a_linear_path_and_where_a_spherical_one_is_straight() -> None:
    a, b = torch.tensor([1.0, 2, -1]), torch.tensor([5.0, -2, 3])
    torch.testing.assert_close(interpolate(a, b, 5, "linear")[1], a + (b - a) / 4)
    for end in (torch.zeros(3), 2 * a, -a):  # no plane between them
        torch.testing.assert_close(interpolate(a, end, 5), interpolate(a, end, 5, "linear"))


def test_a_traversal_changes_one_number_a_row() -> None:
    latent, values = torch.randn(6, generator=torch.Generator().manual_seed(0)), torch.linspace(-2, 2, 5)
    found = traverse(latent, [1, 4], values)
    assert found.shape == (2, 5, 6)
    for row, axis in enumerate((1, 4)):
        assert torch.equal(found[row, :, axis], values)
        others = [i for i in range(6) if i != axis]
        assert torch.equal(found[row][:, others], latent[others].expand(5, 5))


def test_a_plane_goes_through_what_tells_classes_apart() -> None:
    random = np.random.default_rng(0)
    centres = np.zeros((4, 5))
    centres[:, [1, 3]] = [[9, 0], [-9, 0], [0, 6], [0, -6]]
    labels = [i % 4 for i in range(400)]
    latents = centres[labels] + random.normal(0, 0.5, (400, 5)) * [1, 1, 8, 1, 1]  # number 2 varies within classes
    origin, axes = plane(latents, labels)
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), atol=1e-12)
    assert abs(axes[0, 1]) > 0.99 and abs(axes[1, 3]) > 0.99 and np.abs(origin[[1, 3]]).max() < 2
    _, alone = plane(latents, [7] * 400)  # one class: what tells its latents apart
    assert abs(alone[0, 1]) > 0.9


# --- explore ---


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory, ae_file: Path) -> Path:
    """Random weights, with latent statistics that are not the identity."""
    autoencoder = checkpoint.load_autoencoder(ae_file)
    statistics = LatentStatistics(torch.full((16,), 0.1), 0.5 * torch.eye(16))
    autoencoder.codec = autoencoder.codec.with_statistics(statistics)
    path, model = tmp_path_factory.mktemp("run") / "latest.pt", busy_denoiser(32)
    content = checkpoint.diffusion_content(model, model, NoiseSchedule(), autoencoder, {"only_digit": None})
    checkpoint.write(path, content)
    return path


def without_words(path: Path) -> np.ndarray:
    """The grid of a sheet, which is at its right bottom: what is beside and above it has no black."""
    picture = np.asarray(Image.open(path))
    top, left = np.argwhere(picture == 0).min(axis=0)
    assert top == HEAD and left > 2 * GAP and len(np.unique(picture[:, :left])) > 2, "no words beside the rows"
    return picture[top:, left:]


def test_words_stand_beside_their_rows_and_none_runs_into_another() -> None:
    black = np.zeros((60, 90), dtype=np.uint8)
    whole = labelled(black, ["one", "", "two"], ["-3.0", "0", "+3.0"])
    left = whole.shape[1] - 90
    written = np.flatnonzero((whole[HEAD:, :left] > GROUND + 60).any(axis=1))
    assert {int(row) // 20 for row in written} == {0, 2}  # the middle row has no words
    above = np.flatnonzero((whole[:HEAD, left:] > GROUND + 60).any(axis=0))
    assert {int(column) // 30 for column in above} == {0, 1, 2}
    crowded_head = labelled(black, ["x" * 500] * 3, ["+10000.5"] * 9)[:HEAD]
    bare = (crowded_head[:, -90:] <= GROUND + 60).all(axis=0)
    assert bare.any() and crowded_head.shape[1] <= 90 + LONGEST + 2 * GAP


def test_interpolation_sheet_is_decoded_paths(ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ckpt", str(ckpt), "--output", str(tmp_path / "a.png"), "--device", "cpu"]
    flags += ["--seeds", "5", "--digits", "3,eight,1", "--columns", "4", "--num-inference-steps", "3"]
    assert explore.main(flags) == 0
    assert "3, seed 5 to 8, seed 5" in capsys.readouterr().out
    generator = Generator.open(ckpt)
    ends = generator.latents([5, 5, 5], [3, 8, 1], SamplingConfig(num_inference_steps=3))
    rows = torch.cat([interpolate(ends[0], ends[1], 4), interpolate(ends[1], ends[2], 4)])
    np.testing.assert_array_equal(without_words(tmp_path / "a.png"), grid(generator.decode(rows), 4))
    assert Image.open(tmp_path / "a.png").text["checkpoint"] == generator.sha256  # type: ignore[attr-defined]


def test_traversal_and_plane_sheets(ckpt: Path, tmp_path: Path) -> None:
    flags = ["--ckpt", str(ckpt), "--output", str(tmp_path / "a.png"), "--device", "cpu", "--columns", "5"]
    assert explore.main([*flags, "--sheet", "traverse", "--digits", "none", "--rows", "3", "--span", "2"]) == 0
    generator = Generator.open(ckpt)
    start = generator.latents([42], [None])[0]
    wanted = traverse(start, range(3), torch.linspace(-2, 2, 5)).flatten(0, 1)
    np.testing.assert_array_equal(without_words(tmp_path / "a.png"), grid(generator.decode(wanted), 5))
    assert explore.main([*flags, "--sheet", "plane", "--seeds", "9"]) == 0
    found, right, up = sheets.over_plane(generator, 9, list(range(10)), 5, SamplingConfig())
    assert right == sorted(right) and up == sorted(up, reverse=True) and len(right) == len(up) == 5
    np.testing.assert_array_equal(without_words(tmp_path / "a.png"), grid(generator.decode(found.flatten(0, 1)), 5))
    flat = found.reshape(25, 16).double() - found.reshape(25, 16).double().mean(dim=0)
    assert int((torch.linalg.svdvals(flat) > 1e-4).sum()) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--digits", "7"], "two ends"),
        (["--seeds", "1,x"], "'x' is neither"),
        (["--seeds", "3-1"], "'3-1' is neither"),
        (["--seeds", "0-4294967295"], "at most 1000"),
        (["--seeds", "0-3,2"], "--seeds is different numbers"),
        (["--digits", "cat,1"], r"'cat' is no class of the model; its classes are 0 to 9"),
        (["--sheet", "traverse", "--digits", "1,2"], "starts from one image"),
        (["--sheet", "plane", "--seeds", "1,2"], "takes one of --seeds"),
        (["--sheet", "plane", "--seeds", "4294967295"], "goes by 256 seeds"),
        (["--sheet", "map"], "--sheet is one of interpolate, traverse, plane"),
        (["--output", "x.jpg"], "to be a .png file"),
        (["--output", "no/such/x.png"], "there is no folder no/such"),
    ],
)
def test_explore_refuses_in_one_line(ckpt: Path, tmp_path: Path, flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        explore.main(["--ckpt", str(ckpt), "--output", str(tmp_path / "a.png"), "--device", "cpu", *flags])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


# --- maps ---


def blobs(count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(count) % 3
    centres = 30 * np.eye(3, 6)
    return centres[labels] + np.random.default_rng(2).normal(0, 1, (count, 6)), labels


def test_tsne_keeps_clusters_and_is_the_same_every_time() -> None:
    latents, labels = blobs()
    points = maps.tsne(latents, 10, 3)
    assert points.shape == (60, 2) and maps.scores(points, labels)["silhouette"] > 0.5  # type: ignore[index]
    np.testing.assert_array_equal(points, maps.tsne(latents, 10, 3))
    assert maps.tsne(latents[:, :1], 10, 3).shape == (60, 2)


def test_tsne_refuses_what_it_cannot_lay_out() -> None:
    with pytest.raises(ConfigError, match="--perplexity 60 must be below the 60 points"):
        maps.tsne(blobs()[0], 60, 0)
    with pytest.raises(ConfigError, match="all latents are the same"):
        maps.tsne(np.ones((20, 4)), 5, 0)


def test_scores_are_those_of_their_definitions() -> None:
    points, labels = np.array([[0.0], [1.0], [10.0], [11.0]]), np.array([0, 0, 1, 1])
    found = maps.scores(points, labels)
    near, far = 1.0, np.array([10.5, 9.5])
    assert found is not None
    assert found["silhouette"] == pytest.approx(np.mean(1 - near / far))
    assert found["calinski_harabasz"] == pytest.approx((4 * 5.0**2 / 1) / (4 * 0.5**2 / 2))
    assert maps.scores(points, np.zeros(4)) is None and maps.scores(points, np.arange(4)) is None


def test_images_are_shown_where_points_crowd_and_never_overlap() -> None:
    random = np.random.default_rng(0)
    points = np.concatenate([random.normal(0, 4, (300, 2)), random.uniform(-40, 40, (20, 2))])
    chosen = maps.crowded(points, 20)
    assert len(chosen) >= 2 and all(np.abs(points[row]).max() < 14 for row in chosen)
    size = np.ptp(points, axis=0).max() / 20
    for i, row in enumerate(chosen):
        assert all(np.abs(points[row] - points[other]).max() >= size for other in chosen[:i])


# --- tsne ---


@pytest.fixture(scope="module")
def conv_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("conv") / "conv.pt"
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = registry.build("conv", 8)
    checkpoint.write(path, checkpoint.autoencoder_content(model, "conv", {"seed": 1}))
    return path


def run_tsne(out: Path, folder: Path, *flags: object) -> list[dict[str, str]]:
    """The rows of the CSV."""
    given = ["--dataset", folder, "--output", out, "--perplexity", 5, "--device", "cpu", *flags]
    assert tsne.main([str(flag) for flag in given]) == 0
    with out.with_suffix(".csv").open() as stream:
        return list(csv.DictReader(stream))


def test_two_autoencoders_and_generated_images(
    tmp_path: Path, digits_folder: Path, ae_file: Path, conv_file: Path, ckpt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--ae-ckpt", conv_file, ae_file, "--ckpt", ckpt, "--samples", 30, "--seed", 7]
    rows = run_tsne(tmp_path / "a.png", digits_folder, *flags)
    shown = capsys.readouterr().out
    kinds = [(row["autoencoder"], row["type"], row["kind"]) for row in rows]
    parts = [("0", "conv", "test"), ("0", "conv", "generated"), ("1", "mlp", "test"), ("1", "mlp", "generated")]
    assert kinds == [part for part in parts for _ in range(30)]
    assert [int(row["number"]) for row in rows[30:60]] == list(range(7, 37))
    assert [int(row["label"]) for row in rows[30:60]] == [i % 10 for i in range(30)]
    tests = [int(row["number"]) for row in rows[:30]]
    assert tests == sorted(set(tests)) and max(tests) < 57 and tests == [int(row["number"]) for row in rows[60:90]]
    told = json.loads((tmp_path / "a.json").read_text())
    assert [row["type"] for row in told["autoencoders"]] == ["conv", "mlp"] and told["checkpoint"]["path"] == str(ckpt)
    points = np.array([[float(row["x"]), float(row["y"])] for row in rows[60:90]])
    expected = maps.scores(points, np.array([int(row["label"]) for row in rows[60:90]]))
    assert told["autoencoders"][1]["scores"]["test"]["map"] == pytest.approx(expected, rel=1e-4)
    assert f"silhouette {told['autoencoders'][0]['scores']['generated']['latents']['silhouette']:.3f}" in shown
    picture = Image.open(tmp_path / "a.png")
    assert picture.width > 1.8 * picture.height and "silhouette" in picture.text["scores"]  # type: ignore[attr-defined]


def test_generated_latents_are_the_samplers_own(digits_folder: Path, ckpt: Path, conv_file: Path) -> None:
    """In the space of its own autoencoder: what was sampled, raw. In another: the images, encoded."""
    from ldm_ray.latents.cloud import gather
    from ldm_ray.metrics.floors import encode

    generator = Generator.open(ckpt)
    assert isinstance(generator.codec, LatentCodec)
    wanted = generator.codec.colour(generator.latents([3, 4, 5, 6], [0, 1, 2, 3]))
    settings: dict[str, Any] = {"ckpt": str(ckpt), "dataset": str(digits_folder), "device": "cpu"}
    settings |= {"samples": 4, "seed": 3}
    own = gather(TsneConfig(**settings))
    torch.testing.assert_close(own.clouds[0].latents[4:], wanted, rtol=0, atol=1e-6)
    other = gather(TsneConfig(**settings, ae_ckpt=(str(conv_file),)))
    assert other.made is not None
    images = generator([3, 4, 5, 6], [0, 1, 2, 3])
    assert torch.equal(other.made.images, images)
    expected = encode(checkpoint.load_autoencoder(conv_file).codec, images)
    torch.testing.assert_close(other.clouds[0].latents[4:], expected, rtol=0, atol=1e-5)


def test_tsne_writes_the_same_bytes_again(tmp_path: Path, digits_folder: Path, ae_file: Path) -> None:
    for name in ("a", "b"):
        run_tsne(tmp_path / f"{name}.png", digits_folder, "--ae-ckpt", ae_file, "--samples", 40)
    for ending in ("png", "csv"):
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


def test_tsne_refuses_in_one_line(tmp_path: Path, digits_folder: Path, ae_file: Path, ckpt: Path) -> None:
    for flags, words in (
        ([], "no autoencoder under"),
        (["--ae-ckpt", "a.pt", "b.pt", "c.pt"], "--ae-ckpt takes 1 to 2 values, not 3"),
        (["--ae-ckpt", ckpt], "holds a denoiser"),
        (["--ae-ckpt", ae_file, "--perplexity", 57], "below the 57 points"),
        (["--ckpt", ckpt, "--seed", 2**32 - 2], "beyond the last seed"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=words) as error:
            run_tsne(tmp_path / "a.png", digits_folder, "--outdir", tmp_path, *flags)
        assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
