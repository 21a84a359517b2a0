"""A worker's training run without Ray, cut short at every write."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ldm_ray.checkpoints import checkpoint
from ldm_ray.checkpoints.runs import RunPaths
from ldm_ray.data.examples import fixed_size, write_examples
from ldm_ray.files.paths import append_line
from ldm_ray.settings.training import TrainConfig
from ldm_ray.training import fit as module
from ldm_ray.training.fit import Job, Place, fit
from tests.helpers.checkpoints import same_weights

EPOCHS = 3


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, ae_file: Path) -> Job:
    folder = tmp_path_factory.mktemp("fit")
    labels = np.arange(60) % 10
    latents = np.random.default_rng(0).standard_normal((60, 16)).astype(np.float32)
    columns = {"latent": fixed_size(latents), "label": labels, "index": np.arange(60)}
    write_examples(folder / "examples", pa.table(columns), "latent", {"made": "here"})
    config = TrainConfig(epochs=EPOCHS, batch_size=32, hidden_dim=16, device="cpu")
    embedded = checkpoint.embed(checkpoint.load_autoencoder(ae_file))
    return Job(config, RunPaths(folder, "run"), folder / "examples", {}, embedded)


def trained(job: Job, name: str) -> RunPaths:
    """Trains a run to its end, or goes on with it."""
    paths = RunPaths(job.paths.outdir, name)
    fit(Job(job.config, paths, job.examples, job.data, job.autoencoder), place(), lambda _: None)
    return paths


def place() -> Place:
    return Place(0, 1, torch.device("cpu"), lambda model: model)


@pytest.mark.parametrize("writer", ["checkpoint", "record"])
@pytest.mark.parametrize("number", range(2 * EPOCHS))
def test_a_run_cut_short_at_any_write_records_every_epoch_once(
    job: Job, writer: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch writes two checkpoints and one record; a run that is killed before one of them goes on from the last."""

    class Cut(Exception): ...

    home, name = (checkpoint, "write") if writer == "checkpoint" else (module, "append_record")
    original, left = getattr(home, name), iter([False] * number + [True])

    def cut(*arguments: object) -> None:
        if next(left, False):
            raise Cut
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(home, name, cut)
        try:
            trained(job, f"{writer}-{number}")
        except Cut:
            pass
        else:
            assert writer == "record" and number >= EPOCHS  # there is none so late
    paths = trained(job, f"{writer}-{number}")
    undisturbed = trained(job, "undisturbed")
    assert same_weights(Path(str(paths.latest)), Path(str(undisturbed.latest)))
    lines = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1))


@pytest.mark.parametrize("size", ["4k", "12k", "2200k", "3600k", "7m"])
def test_a_full_disk_leaves_nothing_half_written(job: Job, size: str, small_disk: Callable[[str], Path]) -> None:
    """Full at the first record, at TensorBoard's file, at the first, the second and a later checkpoint."""
    paths = RunPaths(small_disk(f"size={size}"), "run")
    with pytest.raises(OSError) as error:
        fit(Job(job.config, paths, job.examples, job.data, job.autoencoder), place(), lambda _: None)
    assert error.value.errno == errno.ENOSPC
    files = [file for file in paths.outdir.rglob("*") if file.is_file()]  # type: ignore[union-attr]
    assert not [file for file in files if "partial" in file.name]
    for file in files:
        if file.suffix == ".pt":
            checkpoint.read(file)
        elif file.suffix in (".json", ".jsonl"):
            assert all(json.loads(line) for line in file.read_text().splitlines())
    subprocess.run(["mount", "-o", "remount,size=64m", str(paths.outdir)], check=True)
    fit(Job(job.config, paths, job.examples, job.data, job.autoencoder), place(), lambda _: None)
    undisturbed = trained(job, "undisturbed")
    assert same_weights(Path(str(paths.latest)), Path(str(undisturbed.latest)))


def test_a_line_that_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    append_line(file, "first")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))  # as ``ulimit -f`` has it
    try:
        with pytest.raises(OSError):
            append_line(file, "a line of more than twenty characters")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_text() == "first\n"
    append_line(file, "second")
    assert file.read_text() == "first\nsecond\n"


def test_tensorboard_reads_what_was_recorded(job: Job) -> None:
    from tensorboardX.proto.event_pb2 import Event

    paths = trained(job, "board")
    [file] = Path(str(paths.runs)).glob("events.out.tfevents.*")
    data, events = file.read_bytes(), []
    while data:  # of each record: the length in 8 bytes, a checksum of 4, the event, a checksum of 4
        length = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    losses = {e.step: v.simple_value for e in events for v in e.summary.value if v.tag == "val_loss"}
    recorded = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    assert losses == pytest.approx({line["epoch"]: line["val_loss"] for line in recorded})
