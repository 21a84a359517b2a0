"""Datasets with other classes, names and sizes: from metadata or folders to checkpoints, labels and prompts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ldm_ray import infer, inspect
from ldm_ray.checkpoints import checkpoint
from ldm_ray.data.classes import class_in, class_of, classes_of, names_in, numbered, usable_names
from ldm_ray.data.digits import digits_table
from ldm_ray.data.sources import load_source
from ldm_ray.dataset.rows import Labels
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.engine.generator import Generator
from ldm_ray.models import registry
from ldm_ray.models.codec import LatentCodec
from ldm_ray.models.denoiser import Denoiser
from ldm_ray.settings.errors import CheckpointError, ConfigError, DataError
from tests.helpers.data import Shared
from tests.helpers.networks import busy_denoiser

GARMENTS = ("T - shirt / top", "Trouser", "Ankle boot")


def one_line(error: pytest.ExceptionInfo[ValueError]) -> None:
    assert "\n" not in str(error.value)


# --- names ---


def test_a_class_by_name_number_or_word() -> None:
    assert class_of(" Trouser ", GARMENTS) == class_of("trouser", GARMENTS) == class_of("1", GARMENTS) == 1
    assert class_of("seven", numbered(10)) == class_of("7", numbered(10)) == 7
    assert class_of("2", ("2", "4", "6")) == 0 and class_of("1", ("2", "4", "6")) == 1  # a name wins over a number
    assert class_of("four", ("2", "4", "6")) == 1
    assert class_of("a", ("A", "a")) == 1
    assert classes_of("1,Ankle boot", GARMENTS) == [1, 2] and classes_of("a, b", ("x", "a, b")) == [1]
    for text, names in (("3", GARMENTS), ("boot", GARMENTS), ("01", numbered(10)), ("-1", GARMENTS), ("", GARMENTS)):
        with pytest.raises(ConfigError, match="no class of the model; its classes are") as error:
            class_of(text, names)
        one_line(error)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [("trouser", 1), ("a picture of an Ankle boot", 2), ("the t-shirt/top", 0), ("T - shirt / top", 0), ("2", 2)],
)
def test_a_prompt_names_a_class(prompt: str, found: int) -> None:
    assert class_in(prompt, GARMENTS) == found


def test_prompts_that_name_no_class_or_several() -> None:
    assert class_in("a handwritten seven", numbered(10)) == 7 and class_in("A", ("B", "A")) == 1
    for prompt in ("", "boot", "trouser and ankle boot", "seven"):
        with pytest.raises(ConfigError, match=r"one class: T - shirt / top, Trouser, Ankle boot"):
            class_in(prompt, GARMENTS)
    for prompt in ("", "1 2", "eleven", "07"):
        with pytest.raises(ConfigError, match='one digit, such as "7" or "seven"'):
            class_in(prompt, numbered(10))


def test_names_in_files_are_untrusted() -> None:
    assert usable_names(["a", "b"]) == ("a", "b")
    for bad in (None, "ab", [], ["a", "a"], ["a", 1], ["a", ""], ["a", "b\x1b[0m"], ["x" * 101], ["a\nb"], {"a": 1}):
        assert usable_names(bad) is None
        assert names_in({"data": {"class_names": bad}}, 2) == ("0", "1")
    assert names_in({"data": {"class_names": ["a", "b"]}}, 2) == ("a", "b")
    assert names_in({"data": {"class_names": ["a", "b"]}}, 3) == names_in({"data": 7}, 3) == numbered(3)


def test_labels_of_a_dataset_by_name() -> None:
    assert Labels.parse("Trouser,2", 3, 5, names=GARMENTS).cycle == (1, 2)
    assert Labels.parse("T - shirt / top", 3, 5, names=GARMENTS).rule == "0"
    assert Labels.parse("0-2", 3, 5, names=GARMENTS).cycle == (0, 1, 2)


# --- where they come from ---


def png(height: int, width: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(folder: Path, names: object, labels: list[int], split: str = "train") -> Path:
    rows = [{"bytes": png(6, 4, i), "path": None} for i in range(len(labels))]
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    table = pa.table({"image": image, "label": labels})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_names_from_a_parquet_folders_metadata(tmp_path: Path) -> None:
    source = load_source(str(parquet(tmp_path, GARMENTS, [0, 1])), "train", tmp_path)
    assert source.class_names == GARMENTS and source.num_classes == 3 and source.image_size == (6, 4)
    with pytest.raises(DataError, match=r"labels from 0 to 3; allowed are 0 to 2, since its metadata names 3") as error:
        load_source(str(parquet(tmp_path, GARMENTS, [0, 3])), "train", tmp_path)
    one_line(error)
    assert load_source(str(parquet(tmp_path, ["a", 1], [0, 4])), "train", tmp_path).class_names == numbered(5)
    only = load_source(str(parquet(tmp_path, None, [0, 4])), "train", tmp_path, only_digit=0)
    assert only.num_classes == 5 and len(only) == 1


def test_without_metadata_the_highest_label_counts(digits_folder: Path, tmp_path: Path) -> None:
    assert load_source(str(digits_folder), "train", tmp_path).class_names == numbered(10)
    assert load_source("digits", "test", tmp_path).class_names == numbered(10)


def image_folder(folder: Path, counts: dict[str, int], size: tuple[int, int] = (6, 4)) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (folder / name / f"{i:03d}.png").write_bytes(png(*size, seed=1000 * number + i))
    return folder


def test_a_folder_of_classes_with_splits(tmp_path: Path) -> None:
    image_folder(tmp_path, {"train/cat": 3, "train/ant": 2, "test/cat": 1, "test/bee": 1, "train/.hidden": 1})
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no picture")
    train, test = (load_source(str(tmp_path), split, tmp_path) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("ant", "bee", "cat")
    assert train.table["label"].to_pylist() == [0, 0, 2, 2, 2] and test.table["label"].to_pylist() == [1, 2]
    assert train.revision != test.revision and train.revision == load_source(str(tmp_path), "train", tmp_path).revision
    images, _ = train.decode()
    expected = Image.open(tmp_path / "train" / "cat" / "002.png")
    np.testing.assert_array_equal(images[-1, 0].numpy(), np.asarray(expected))


def test_a_folder_of_classes_without_splits(tmp_path: Path) -> None:
    """About a tenth is held out, and each image stays where it is when others come."""

    def parts() -> dict[str, set[str]]:
        sources = {split: load_source(str(tmp_path), split, tmp_path) for split in ("train", "test")}
        return {key: {row["path"] for row in source.table["image"].to_pylist()} for key, source in sources.items()}

    before = parts() if image_folder(tmp_path, {"10": 40, "9": 40}) else {}
    assert load_source(str(tmp_path), "train", tmp_path).class_names == ("9", "10")
    assert not before["train"] & before["test"] and len(before["train"] | before["test"]) == 80
    assert 2 <= len(before["test"]) <= 16
    image_folder(tmp_path, {"1": 30, "9": 60})
    after = parts()
    assert before["train"] <= after["train"] and before["test"] <= after["test"]


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"train/cat": 2}, "no image for the split 'test'"),
        ({"cat": 0, "dog": 0}, "no Parquet file for the split 'test'.*no PNG in a folder for each class"),
        ({"c\nat": 9}, "printable names"),
    ],
)
def test_folders_of_classes_that_are_refused(tmp_path: Path, counts: dict[str, int], words: str) -> None:
    image_folder(tmp_path, counts)
    with pytest.raises(DataError, match=words) as error:
        load_source(str(tmp_path), "test", tmp_path)
    one_line(error)


def test_a_bad_picture_is_named_by_its_file(tmp_path: Path) -> None:
    image_folder(tmp_path, {"train/cat": 3})
    Image.new("RGB", (4, 6)).save(tmp_path / "train" / "cat" / "001.png")
    with pytest.raises(DataError, match=r"image 1 \(cat/001\.png\) of .* mode RGB"):
        load_source(str(tmp_path), "train", tmp_path).decode()


# --- sizes ---


@pytest.mark.parametrize(
    ("kind", "size"),
    [("mlp", (1, 1)), ("mlp", (9, 31)), ("conv", (32, 32)), ("conv", (2, 2)), ("conv", (18, 46)), ("conv", (64, 28))],
)
def test_autoencoders_of_other_sizes_survive_their_file(tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    model = registry.build(kind, 5, size)
    images = torch.rand(3, 1, *size, generator=torch.Generator().manual_seed(0))
    assert model.encoder(images).shape == (3, 5) and model(images).shape == images.shape
    checkpoint.write(tmp_path / "ae.pt", checkpoint.autoencoder_content(model, kind, {}))
    loaded = checkpoint.load_autoencoder(tmp_path / "ae.pt")
    assert loaded.codec.image_size == size
    torch.testing.assert_close(loaded.codec.encode(images), model.encoder(images).detach())
    carried = checkpoint.from_embedded(checkpoint.embed(loaded), tmp_path)
    assert carried is not None and carried.codec.image_size == size


def test_sizes_that_an_autoencoder_does_not_take() -> None:
    with pytest.raises(ConfigError, match=r"images are 27x28; the autoencoder type conv takes .*another type: mlp"):
        registry.build("conv", 4, (27, 28))
    with pytest.raises(ConfigError, match=r"images are 2000x2000; the autoencoder type mlp takes"):
        registry.build("mlp", 4, (2000, 2000))


@pytest.mark.parametrize("size", [[28], "28x28", [0, 28], [True, 28], [28.0, 28], [5000, 5000], [29, 28], [1024, 1024]])
def test_a_damaged_size_is_refused(tmp_path: Path, size: object) -> None:
    """Before memory is taken for it."""
    content = checkpoint.autoencoder_content(registry.build("mlp", 4), "mlp", {})
    content["args"]["image_size"] = size
    checkpoint.write(tmp_path / "ae.pt", content)
    with pytest.raises(CheckpointError, match=r"image_size' must be height and width|the weights do not fit") as error:
        checkpoint.load_autoencoder(tmp_path / "ae.pt")
    one_line(error)


def test_existing_files_are_28_by_28_with_ten_classes(shared: Shared) -> None:
    for name in ("ae-conv.pt", "ae-mlp.pt"):
        assert checkpoint.load_autoencoder(shared.checkpoints / name).codec.image_size == (28, 28)
    assert checkpoint.load_diffusion(shared.checkpoints / "latent-diffusion.pt").class_names == numbered(10)


# --- from a checkpoint to images ---


@pytest.fixture(scope="module")
def garments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser of three named classes with an autoencoder of 20×24 pixels, both untrained."""
    folder = tmp_path_factory.mktemp("garments")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec, model = LatentCodec(registry.build("conv", 6, (20, 24)), "conv"), Denoiser(6, 16, 3)
        torch.nn.init.normal_(model.out_proj.weight)
    autoencoder = checkpoint.AutoencoderCheckpoint(codec=codec, path="ae.pt", sha256="0")
    content = checkpoint.diffusion_content(
        model, model, NoiseSchedule(50), autoencoder, {"only_digit": None}, data={"class_names": list(GARMENTS)}
    )
    checkpoint.write(folder / "latest.pt", content)
    return folder / "latest.pt"


def test_inspect_shows_names_and_size(garments: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(garments)]) == 0
    shown = capsys.readouterr().out
    assert "T - shirt / top, Trouser, Ankle boot" in shown and "(20, 24)" in shown


def test_infer_takes_a_name_and_makes_the_size(garments: Path, tmp_path: Path) -> None:
    flags = ["--ckpt", str(garments), "--output", str(tmp_path / "a.png"), "--num-images", "1", "--seed", "3"]
    assert infer.main([*flags, "--digit", "ankle boot"]) == 0
    wanted = Generator.open(garments)([3], [2])
    assert wanted.shape == (1, 1, 20, 24)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), wanted[0, 0].numpy())
    with pytest.raises(ConfigError, match="'hat' is no class of the model; its classes are T - shirt / top, Trouser"):
        infer.main([*flags, "--digit", "hat"])


def test_a_name_gives_the_bytes_of_its_number(ae_file: Path, tmp_path: Path) -> None:
    model = busy_denoiser(32)
    content = checkpoint.diffusion_content(model, model, NoiseSchedule(), checkpoint.load_autoencoder(ae_file), {})
    checkpoint.write(tmp_path / "latest.pt", content)
    flags = ["--ckpt", str(tmp_path / "latest.pt"), "--num-images", "2"]
    for name in ("7", "seven"):
        assert infer.main([*flags, "--output", str(tmp_path / f"{name}.png"), "--digit", name]) == 0
    assert (tmp_path / "7.png").read_bytes() == (tmp_path / "seven.png").read_bytes()


def test_evaluate_measures_digits_alone(garments: Path, digits_folder: Path, tmp_path: Path) -> None:
    from ldm_ray import evaluate

    flags = ["--ckpt", str(garments), "--dataset", str(digits_folder), "--outdir", str(tmp_path)]
    with pytest.raises(DataError, match="classifiers of 10 digits; the checkpoint has 3 classes"):
        evaluate.main([*flags, "--output", str(tmp_path / "made"), "--device", "cpu"])


def test_the_service_refuses_another_size(garments: Path) -> None:
    from ldm_ray.service.settings import Mistake, check

    with pytest.raises(Mistake, match=r"makes images of 20x24; the service is of 28x28"):
        check(str(garments), None, str(garments.parent))


def test_the_embedded_digits_are_a_dataset_of_ten(tmp_path: Path) -> None:
    pq.write_table(digits_table("test").slice(0, 40), tmp_path / "test-0.parquet")
    assert load_source(str(tmp_path), "test", tmp_path).num_classes == 10
