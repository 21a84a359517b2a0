"""Quality beside training: Ray Train runs ``measure`` on a checkpoint while the workers go on."""

from __future__ import annotations

import functools
import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import Checkpoint, ValidationConfig

from ldm_ray.checkpoints import checkpoint
from ldm_ray.checkpoints.runs import RunPaths
from ldm_ray.data.recorded import warn
from ldm_ray.data.sources import ImageSource
from ldm_ray.files.paths import to_path
from ldm_ray.files.records import append_record, read_records
from ldm_ray.metrics.evaluation import figures_of
from ldm_ray.metrics.lenet import is_mnist, others_note
from ldm_ray.settings.training import RunConfig, TrainConfig

FIGURE = "fd_lenet"
POINTER = "checkpoint"
KEPT = (FIGURE, "precision", "recall", "accuracy", "count")
log = logging.getLogger(__name__)


def validation_of(config: RunConfig, paths: RunPaths, test: ImageSource | None) -> ValidationConfig | None:
    """For the trainer; None when nothing is measured. The test images go to the object store once."""
    if test is None:
        return None
    assert isinstance(config, TrainConfig)
    images, labels = test.decode()
    if not is_mnist(images, labels):
        warn([others_note(test.name)])
    fn = functools.partial(measure, images=ray.put(images.numpy()), paths=paths, samples=config.evaluate_samples)
    # Without a core of its own: the workers have them all, and its thread takes what they leave
    return ValidationConfig(fn, ray_remote_kwargs={"num_cpus": 0})


def reported(config: RunConfig, paths: RunPaths, first: bool, metrics: dict[str, Any]) -> None:
    """``ray.train.report``, with the epoch's checkpoint where that is to be measured."""
    finished = "train_loss" in metrics and not metrics.get("stopped")
    if not (first and finished and config.evaluates(metrics["epoch"])):
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:  # Train keeps a pointer: the checkpoint lies where it belongs
        Path(folder, POINTER).write_text(str(paths.checkpoint(metrics["epoch"])), "utf-8")
        ray.train.report(metrics, checkpoint=Checkpoint(folder), validation=True)


def measure(found: Checkpoint, *, images: ray.ObjectRef, paths: RunPaths, samples: int) -> dict[str, Any]:
    """Figures of a checkpoint, in ``quality.jsonl`` as well; the best checkpoint so far becomes ``best.pt``."""
    with found.as_directory() as folder:
        path = to_path(Path(folder, POINTER).read_text("utf-8"))
    torch.set_num_threads(1)
    figures = figures_of(path, torch.tensor(ray.get(images)), samples)
    content, _ = checkpoint.read(path)
    kept = {"epoch": content["epoch"]} | {name: figures[name] for name in KEPT}
    others = [line[FIGURE] for line in read_records(paths.quality) if line["epoch"] != content["epoch"]]
    if kept[FIGURE] < min(others, default=math.inf):
        checkpoint.write(paths.best, content | {"quality": kept})
    append_record(paths.quality, kept)
    return kept
