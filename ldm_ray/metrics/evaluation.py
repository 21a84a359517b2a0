"""A checkpoint's whole evaluation: floors, samples of every sampling seed and guidance scale, their figures."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_ray.checkpoints.runs import floors_file
from ldm_ray.data.recorded import warn
from ldm_ray.data.sources import ImageSource
from ldm_ray.engine.generator import DEFAULT, Generator
from ldm_ray.files.paths import AnyPath, outdir, write_bytes
from ldm_ray.files.records import fingerprint
from ldm_ray.metrics.floors import autoencoder_hash, floors
from ldm_ray.metrics.lenet import NUM_CLASSES, SHA256, Classifiers, is_mnist, others_note
from ldm_ray.metrics.quality import Reference, quality
from ldm_ray.models.codec import Codec
from ldm_ray.settings.errors import DataError
from ldm_ray.settings.evaluation import EvaluateConfig
from ldm_ray.settings.sampling import SamplingConfig
from ldm_ray.terminal.progress import Progress

FLOORS_VERSION = 2  # one more whenever the floors or the figures are defined anew
BATCH = 2048  # images at a time
FULL_DDPM = SamplingConfig(sampler="ddpm")  # every timestep, as published
log = logging.getLogger(__name__)


def evaluate(
    config: EvaluateConfig, generator: Generator, sources: list[ImageSource]
) -> tuple[dict[str, Any], np.ndarray]:
    """(what goes into metrics.json, the picture (H, W, 3) uint8). sources: the training and the test images to compare
    with, of the one class that the checkpoint was trained on, if it was. DataError: other than ten classes."""
    from ldm_ray.metrics.report import picture

    device = generator.device if generator.device.type == "cuda" else "cpu"  # float64 is not there on mps
    classifiers, only_digit = Classifiers.shipped(device), sources[0].only_digit
    for what, count in (("the checkpoint", generator.num_classes), *((s.name, s.num_classes) for s in sources)):
        if count > NUM_CLASSES or (count < NUM_CLASSES and what == "the checkpoint"):
            raise DataError(f"evaluate measures with classifiers of {NUM_CLASSES} digits; {what} has {count} classes")
    with Progress(f"reading {sources[0].name}: {len(sources[0]):,} training and {len(sources[1]):,} test images"):
        train, test = (source.decode() for source in sources)
    notes = [] if is_mnist(*test) else [others_note(sources[1].name)]
    warn(notes)
    with Progress("measuring the real images"):
        reference = Reference.of(test[0], train[0], classifiers)

    def measure_floors(codec: Codec) -> dict[str, dict[str, Any]]:
        return floors(codec, train, test, reference, config.samples, config.baselines)

    kept = kept_floors(config, generator.codec, sources, measure_floors)
    results: dict[str, Any] = {"floors": kept, "samples": [], "notes": notes}
    sampler = Sampler(config, generator, reference, only_digit)
    for scale in config.scales():
        results["samples"].append(sampler.row(config.sampling_at(scale)))
    if config.ddpm_floor:
        results["floors"]["ddpm"] = sampler.row(FULL_DDPM)["mean"]
    assert sampler.first is not None
    results["dataset"] = {s.split: {"name": s.name, "revision": s.revision, "count": len(s)} for s in sources}
    return results, picture(*sampler.first, reference)


def figures_of(ckpt: AnyPath, test: Tensor, samples: int) -> dict[str, Any]:
    """``quality`` of a checkpoint's images by the default sampler against test (N, 1, 28, 28) uint8, on the CPU:
    what can be asked for often. Image i has the seed i and each class in turn."""
    generator = Generator.open(ckpt)
    labels = generator.in_turn(samples)
    images = make(generator, range(samples), labels, DEFAULT, f"measuring {ckpt}")
    return quality(images, torch.tensor(labels), Reference.of(test), memorisation=False)


def make(
    generator: Generator, seeds: Sequence[int], labels: Sequence[int], sampling: SamplingConfig, what: str
) -> Tensor:
    """Images (N, 1, H, W) uint8 of many seeds, a batch at a time."""
    with generator.progress(what, len(seeds), sampling) as progress:
        parts = [slice(first, first + BATCH) for first in range(0, len(seeds), BATCH)]
        return torch.cat([generator(seeds[part], labels[part], sampling, progress.watch) for part in parts])


class Sampler:
    """Makes and measures the samples of a row, one sampling seed after another.

    Image i of sampling seed s has the image seed s·samples + i and the label i mod 10, so no two sampling seeds
    share an image.
    """

    def __init__(self, config: EvaluateConfig, generator: Generator, reference: Reference, digit: int | None) -> None:
        self.config, self.generator, self.reference = config, generator, reference
        self.labels = generator.in_turn(config.samples, digit)
        self.first: tuple[Tensor, Tensor] | None = None  # images and labels of the first set, for the picture

    def row(self, sampling: SamplingConfig) -> dict[str, Any]:
        """The sampling settings, ``mean`` and ``sd`` of each figure over the sampling seeds, and all ``runs``."""
        runs = [self.run(seed, sampling) for seed in self.config.sampling_seeds()]
        figures = [{name: value for name, value in run.items() if name != "seed"} for run in runs]
        return sampling.to_dict() | {
            "mean": over_runs(figures, statistics.fmean),
            "sd": over_runs(figures, sd),
            "runs": runs,
        }

    def run(self, seed: int, sampling: SamplingConfig) -> dict[str, Any]:
        count, began = self.config.samples, time.perf_counter()
        seeds = range(seed * count, (seed + 1) * count)
        images = make(self.generator, seeds, self.labels, sampling, f"sampling seed {seed}, {words_of(sampling)}")
        seconds, labels = time.perf_counter() - began, torch.tensor(self.labels)
        self.first = self.first or (images, labels)
        log.info("sampling seed %d, %s: %d images, %.0f/s", seed, words_of(sampling), count, count / seconds)
        with Progress(f"sampling seed {seed}: measuring {count:,} images"):
            figures = quality(images, labels, self.reference)
        log.info("sampling seed %d, %s: FD-LeNet %.2f", seed, words_of(sampling), figures["fd_lenet"])
        return {"seed": seed, "images_per_second": count / seconds} | figures


def words_of(sampling: SamplingConfig) -> str:
    return f"{sampling.sampler}, guidance {sampling.guidance_scale}"


def over_runs(runs: list[dict[str, Any]], of: Callable[[list[float]], float | None]) -> dict[str, Any]:
    """``of`` over each figure's values; lists of figures item by item; None where a value is missing."""

    def joined(values: list[Any]) -> Any:
        if isinstance(values[0], list):
            return [joined(list(items)) for items in zip(*values, strict=True)]
        return None if None in values else of([float(value) for value in values])

    return {name: joined([run[name] for run in runs]) for name in runs[0]}


def sd(values: list[float]) -> float | None:
    """Standard deviation over sampling seeds (n − 1); None for a single one."""
    return statistics.stdev(values) if len(values) > 1 else None


def kept_floors(
    config: EvaluateConfig,
    codec: Codec,
    sources: list[ImageSource],
    measure: Callable[[Codec], dict[str, dict[str, Any]]],
) -> dict[str, dict[str, Any]]:
    """The floors, from the output directory where they were measured before for the same autoencoder, images,
    count and classifiers."""
    identity = {
        "floors": FLOORS_VERSION,
        "autoencoder": autoencoder_hash(codec),
        "dataset": [source.revision for source in sources],
        "only_digit": sources[0].only_digit,
        "samples": config.samples,
        "baselines": config.baselines,
        "classifiers": SHA256,
    }
    path = floors_file(outdir(config.outdir), fingerprint(identity))
    if path.is_file():
        try:
            kept = json.loads(path.read_text())
            if kept["identity"] == identity:
                log.info("floors: from %s", path)
                return kept["floors"]
        except (ValueError, KeyError, TypeError):
            log.warning("%s is damaged: measuring the floors again", path)
    measured = measure(codec)
    write_json(path, {"identity": identity, "floors": measured})
    return measured


def write_json(path: AnyPath, content: dict[str, Any]) -> None:
    """At once or not at all."""
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
