"""Datasets of generated images without Ray: formats, commit, verification, requests."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from ldm_ray import generate
from ldm_ray.checkpoints.choose import load
from ldm_ray.data.images import decode_png, encode_png
from ldm_ray.data.sources import load_source
from ldm_ray.dataset.request import MANIFEST, write_manifest
from ldm_ray.dataset.shards import Job, ShardMaker, committed
from ldm_ray.engine.generator import Generator, fingerprint_of
from ldm_ray.files.store import Store
from ldm_ray.settings.datasets import GenerateConfig
from ldm_ray.settings.errors import ConfigError, DataError, LdmError
from ldm_ray.settings.sampling import SamplingConfig
from tests.helpers.checkpoints import write_small_checkpoint

SEEDS = "5-100,3,3,200-230"  # 129 images in 3 shards


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory, ae_file: Path) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("denoiser") / "latest.pt", ae_file)


def flags_of(ckpt: Path, out: object, **given: object) -> dict[str, object]:
    return {"ckpt": str(ckpt), "outdir": str(out), "seeds": SEEDS, "shard_size": 50, "device": "cpu", **given}


def maker_of(ckpt: Path, out: object, **given: object) -> ShardMaker:
    """What a worker makes shards with, in this process; the manifest is written."""
    config = GenerateConfig(**flags_of(ckpt, out, **given))  # type: ignore[arg-type]
    model, store = load(ckpt), Store(config.outdir)
    request = generate.request_of(config, model, fingerprint_of(torch.device("cpu"), config.precision))
    write_manifest(store, request.manifest(str(ckpt), None, "cpu"))
    return Job(model, request, store, config.batch_size).maker("cpu")


def command(ckpt: Path, out: object, **given: object) -> int:
    """The command over the same flags: it finds all shards there and starts no Ray."""
    words: list[str] = []
    for key, value in flags_of(ckpt, out, **given).items():
        words += [f"--{key.replace('_', '-')}"] if value is True else [f"--{key.replace('_', '-')}", str(value)]
    return generate.main(words)


def fill(ckpt: Path, out: Path, **given: object) -> Path:
    maker = maker_of(ckpt, out, **{key: value for key, value in given.items() if key != "npz"})
    for number in reversed(range(maker.request.num_shards)):
        assert maker(number)[1]
    assert command(ckpt, out, **given) == 0
    return out


@pytest.fixture(scope="module")
def parquet(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(ckpt, tmp_path_factory.mktemp("parquet") / "set", npz=True)


@pytest.fixture(scope="module")
def wanted(ckpt: Path) -> np.ndarray:
    """(129, 28, 28): what the generator itself makes, all in one batch."""
    seeds = [*range(5, 101), 3, 3, *range(200, 231)]
    return Generator.open(ckpt)(seeds, [i % 10 for i in range(129)])[:, 0].numpy()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


# --- what others open ---


def test_datasets_opens_it_as_images(parquet: Path, wanted: np.ndarray, tmp_path: Path) -> None:
    import datasets

    found = datasets.load_dataset(str(parquet), cache_dir=str(tmp_path), split="train")
    assert found.features["label"].names == [str(i) for i in range(10)] and len(found) == 129
    assert found[128]["seed"] == 230 and found[128]["label"] == 8
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in found["image"]]), wanted)


def test_pandas_and_duckdb_open_it(parquet: Path, wanted: np.ndarray) -> None:
    frame = pandas.read_parquet(parquet / "data")
    assert frame["seed"].tolist() == [*range(5, 101), 3, 3, *range(200, 231)]
    assert frame["label"].tolist() == [i % 10 for i in range(129)]
    np.testing.assert_array_equal(np.stack([pixels(image["bytes"]) for image in frame["image"]]), wanted)
    assert [image["bytes"] for image in frame["image"]] == [encode_png(image) for image in wanted]
    duckdb = pytest.importorskip("duckdb")
    found = duckdb.sql(f"select seed, label, image.bytes from '{parquet}/data/*.parquet' where seed = 230").fetchall()
    assert found == [(230, 8, encode_png(wanted[128]))]


def test_npz_is_what_evaluators_read(parquet: Path, wanted: np.ndarray) -> None:
    with np.load(parquet / "images.npz") as found:
        assert found["arr_0"].shape == (129, 28, 28, 3) and found["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(found["arr_0"], np.repeat(wanted[..., None], 3, axis=3))
        assert found["arr_1"].tolist() == [i % 10 for i in range(129)]


@pytest.mark.parametrize("format", ["png", "webdataset"])
def test_other_formats(format: str, ckpt: Path, wanted: np.ndarray, tmp_path: Path) -> None:
    import datasets

    out = fill(ckpt, tmp_path / "set", format=format, save_latents=True)
    found = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"), split="train")
    assert len(found) == 129
    column = "image" if format == "png" else "png"
    told = [row if format == "png" else row["json"] for row in found]
    there = {
        (row["seed"], row["label"], np.asarray(image).tobytes()) for row, image in zip(told, found[column], strict=True)
    }
    seeds = [*range(5, 101), 3, 3, *range(200, 231)]
    assert there == {(seeds[i], i % 10, image.tobytes()) for i, image in enumerate(wanted)}
    if format == "png":  # it can be trained on
        source = load_source(str(out), "train", tmp_path)
        np.testing.assert_array_equal(source.decode()[0][:, 0].numpy(), wanted)
        assert source.table["label"].to_pylist() == [i % 10 for i in range(129)] and source.num_classes == 10
    assert generate.main(["verify", str(out), "--sample", "129"]) == 0
    victim = next((out / "data").rglob("0000000077.png" if format == "png" else "train-00001*.tar"))
    flip(victim, 600)
    assert generate.main(["verify", str(out), "--sample", "0"]) == 1


# --- commit ---


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_verify_finds_what_is_wrong(
    ckpt: Path, parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(parquet, tmp_path / "set"))
    assert generate.main(["verify", str(out), "--sample", "60"]) == 0
    assert "60 images made again have the same bytes" in capsys.readouterr().out
    second = out / "data" / "train-00001-of-00003.parquet"
    flip(second, 5000)
    assert generate.main(["verify", str(out), "--sample", "0"]) == 1
    assert "data/train-00001-of-00003.parquet is not the file that was written" in capsys.readouterr().out
    second.unlink()
    assert generate.main(["verify", str(out)]) == 1
    assert "data/train-00001-of-00003.parquet is missing" in capsys.readouterr().out
    maker = maker_of(ckpt, out)
    assert [maker(number)[1] for number in range(3)] == [False, True, False]
    assert second.read_bytes() == (parquet / second.relative_to(out)).read_bytes()
    other = tmp_path / "other.pt"
    other.write_bytes(ckpt.read_bytes()[:-1] + b"\1")
    with pytest.raises(ConfigError, match="is not the dataset's checkpoint"):
        generate.main(["verify", str(out), "--ckpt", str(other)])


def test_verify_finds_rows_that_were_made_otherwise(ckpt: Path, parquet: Path, tmp_path: Path) -> None:
    """Hashes that agree do not help where the images are not what the request makes."""
    out = Path(shutil.copytree(parquet, tmp_path / "set"))
    (out / "SHA256SUMS").unlink()
    shutil.rmtree(out / "data")
    shutil.rmtree(out / ".committed")
    forged = maker_of(ckpt, out, sampler="ddim")
    for number in range(3):
        forged(number)
    shutil.copy(parquet / MANIFEST, out / MANIFEST)
    assert generate.main(["verify", str(out), "--sample", "0"]) == 0
    assert generate.main(["verify", str(out), "--sample", "20"]) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seeds": "0-100"}, "seeds 5-100,3,3,200-230 there, 0-100 asked for"),
        ({"labels": "7"}, "labels balanced there, 7 asked for"),
        (
            {"sampler": "ddim", "shard_size": 49},
            r"sampler dpmpp_2m_sde there, ddim.*num_inference_steps 10 there, 20 .*shard_size 50",
        ),
        ({"save_latents": True}, "save_latents False there, True"),
        ({"resume": "never"}, "holds a dataset already"),
    ],
)
def test_another_request_is_refused(given: dict[str, object], said: str, ckpt: Path, parquet: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        command(ckpt, parquet, **given)


def test_a_folder_in_use_is_refused(ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files \(thesis.tex\)"):
        command(ckpt, tmp_path)


def test_bf16_is_part_of_the_request(ckpt: Path, parquet: Path, tmp_path: Path) -> None:
    out = fill(ckpt, tmp_path / "half", precision="bf16")
    assert generate.main(["verify", str(out), "--sample", "10"]) == 0
    with pytest.raises(ConfigError, match=r"precision fp32 there, bf16 asked for.*engine"):
        command(ckpt, parquet, precision="bf16")


def test_a_shard_counts_only_with_all_of_its_bytes(ckpt: Path, parquet: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(parquet, tmp_path / "set"))
    data = out / "data" / "train-00000-of-00003.parquet"
    data.write_bytes(data.read_bytes()[:-1])
    (out / ".committed" / "train-00001-of-00003.json").write_text("{")
    (out / "data" / "train-00002-of-00003.parquet").unlink()
    maker = maker_of(ckpt, out)
    assert committed(maker.store, maker.request) == {}
    assert all(maker(number)[1] for number in range(3))
    for file in (parquet / "data").iterdir():
        assert file.read_bytes() == (out / "data" / file.name).read_bytes()


def test_a_full_disk_leaves_nothing_half_written(ckpt: Path, parquet: Path, small_disk: Callable[[str], Path]) -> None:
    out = small_disk("size=64k")
    maker = maker_of(ckpt, out)
    with pytest.raises(DataError, match="No space left on device"):
        for number in range(3):
            maker(number)
    there = sorted(file.name for file in (out / "data").iterdir())
    assert len(there) < 3 and list((out / ".partial").iterdir()) == []
    for name in there:
        assert (out / "data" / name).read_bytes() == (parquet / "data" / name).read_bytes()
    subprocess.run(["mount", "-o", "remount,size=4m", str(out)], check=True)
    assert [maker(number)[1] for number in range(3)] == [
        f"train-0000{i}-of-00003.parquet" not in there for i in range(3)
    ]
    assert command(ckpt, out) == 0
    assert (out / "SHA256SUMS").read_bytes() == (parquet / "SHA256SUMS").read_bytes()


@pytest.mark.parametrize("uri", ["fsspec+memory://bucket/set", "mock:///set"])
def test_other_filesystems(uri: str, ckpt: Path, parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object store (an upload is seen when it is complete), and one with a rename."""
    store = Store(uri)
    monkeypatch.setattr("ldm_ray.files.store.Store", lambda where: store)  # mock:// is empty each time it is opened
    monkeypatch.setitem(globals(), "Store", lambda where: store)
    maker = maker_of(ckpt, uri)
    for number in range(3):
        assert maker(number)[1] and not maker(number)[1]
    assert command(ckpt, uri) == 0
    names = ["README.md", "SHA256SUMS", "preview.png", *(f"data/train-0000{i}-of-00003.parquet" for i in range(3))]
    for name in names:
        assert store.read(name) == (parquet / name).read_bytes()
    assert not store.sizes(".partial")


# --- the rest ---


def test_dry_run_writes_nothing(ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert command(ckpt, tmp_path / "set", dry_run=True) == 0
    torch.set_num_threads(threads)
    told = capsys.readouterr().out
    assert "129 images in 3 shards" in told and "bytes per image" in told and "images/s" in told
    assert re.search(r"size +about \d\d,\d{3} bytes, \d{3} bytes per image", told)  # no "0.0 MB"
    assert not (tmp_path / "set").exists()


def test_one_digit_models_make_their_digit(ae_file: Path, tmp_path: Path) -> None:
    ckpt = write_small_checkpoint(tmp_path / "threes.pt", ae_file, only_digit=3)
    maker = maker_of(ckpt, tmp_path / "set")
    assert maker.request.labels.rule == "3"
    with pytest.raises(LdmError, match="trained on digit 3 alone"):
        maker_of(ckpt, tmp_path / "other", labels="0-4")


def test_requests_are_answered_and_errors_kept_apart(
    ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"custom_id": "a", "body": {"class_label": 7, "n": 3, "seed": 5}},
        {"custom_id": "b", "body": {"prompt": "seven", "seeds": [6]}},
        {"custom_id": "c", "body": {"class_label": [1, None], "n": 2, "guidance_scale": 2.0, "sampler": "ddim"}},
        {"custom_id": "d", "body": {"class_label": 10}},
        {"custom_id": "a", "body": {"class_label": 1}},
        {"body": {"class_label": 1}},
        {"custom_id": "e", "body": {"class_label": 1, "colour": "red"}},
        {"custom_id": "f", "body": {"class_label": 1, "num_inference_steps": 5000}},
        {"custom_id": "g", "body": {"class_label": 1, "n": 10**6}},
        {"custom_id": "h", "body": {"class_label": 1, "guidance_scale": 1e9}},
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)) + "\n\nnot json\n")
    flags = ["--ckpt", str(ckpt), "--requests", str(source), "--output", str(output), "--device", "cpu"]
    assert generate.main(flags) == 1
    assert "8 of 11 requests refused" in capsys.readouterr().out
    answers = {line["custom_id"]: line["response"]["body"]["data"] for line in map(json.loads, output.open())}
    assert list(answers) == ["a", "b", "c"] and answers["b"][0]["b64_json"] == answers["a"][1]["b64_json"]
    generator = Generator.open(ckpt)
    for name, sampling in {"a": SamplingConfig(), "c": SamplingConfig(sampler="ddim", guidance_scale=2.0)}.items():
        made = generator([each["seed"] for each in answers[name]], [each["label"] for each in answers[name]], sampling)
        for each, image in zip(answers[name], made, strict=True):
            np.testing.assert_array_equal(decode_png(base64.b64decode(each["b64_json"])), image[0].numpy())
    errors = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").open()]
    assert [(line["custom_id"], line["error"]["param"], line["error"]["line"]) for line in errors] == [
        ("d", "class_label", 4), ("a", "custom_id", 5), (None, "custom_id", 6), ("e", "colour", 7),
        ("f", "num_inference_steps", 8), ("g", "n", 9), ("h", "guidance_scale", 10), (None, None, 12),
    ]  # fmt: skip
    first = output.read_bytes()
    assert generate.main([*flags, "--batch-size", "1"]) == 1
    assert output.read_bytes() == first
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.errors.jsonl", "out.jsonl"]
    source.write_text(json.dumps(lines[0]))
    assert generate.main([*flags[:4], "--output", str(tmp_path / "fine.jsonl"), "--device", "cpu"]) == 0
    assert "1 request answered with 3 images" in capsys.readouterr().out
