"""A checkpoint's whole evaluation: floors, samples of every sampling seed and guidance scale, their figures."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_ray.config import SamplingConfig, cache_dir, outdir
from ldm_ray.data.examples import fingerprint
from ldm_ray.data.sources import ImageSource, load_source
from ldm_ray.errors import DataError
from ldm_ray.generator import Generator
from ldm_ray.metrics.config import EvaluateConfig
from ldm_ray.metrics.floors import autoencoder_hash, floors
from ldm_ray.metrics.lenet import NUM_CLASSES, SHA256, Classifiers
from ldm_ray.metrics.quality import Reference, quality
from ldm_ray.models.codec import Codec
from ldm_ray.paths import AnyPath, write_bytes
from ldm_ray.runs import floors_file

FLOORS_VERSION = 1  # one more whenever the floors or the figures are defined anew
BATCH = 2048  # images between two looks at the clock
EVERY_S = 5.0
FULL_DDPM = SamplingConfig(sampler="ddpm")  # every timestep, as published
log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig, generator: Generator, only_digit: int | None) -> tuple[dict[str, Any], np.ndarray]:
    """(what goes into metrics.json, the picture (H, W, 3) uint8). only_digit: the one the checkpoint was trained on."""
    from ldm_ray.metrics.report import picture

    device = generator.device if generator.device.type == "cuda" else "cpu"  # float64 is not there on mps
    classifiers = Classifiers.shipped(device)
    sources = [load_source(config.dataset, s, cache_dir(config.cache_dir), only_digit) for s in ("train", "test")]
    log.info("reading %s: %d training and %d test images", sources[0].name, len(sources[0]), len(sources[1]))
    train, test = (source.decode() for source in sources)
    for what, count in (("the checkpoint", generator.num_classes), *((s.name, s.num_classes) for s in sources)):
        if count > NUM_CLASSES or (count < NUM_CLASSES and what == "the checkpoint"):
            raise DataError(f"evaluate measures with classifiers of {NUM_CLASSES} digits; {what} has {count} classes")
    reference = Reference.of(test[0], train[0], classifiers)

    def measure_floors(codec: Codec) -> dict[str, dict[str, Any]]:
        return floors(codec, train, test, reference, config.samples, config.baselines)

    found: dict[str, Any] = {"floors": kept_floors(config, generator.codec, sources, measure_floors), "samples": []}
    sampler = Sampler(config, generator, reference, only_digit)
    for scale in config.scales():
        found["samples"].append(sampler.row(config.sampling_at(scale)))
    if config.ddpm_floor:
        found["floors"]["ddpm"] = sampler.row(FULL_DDPM)["mean"]
    assert sampler.first is not None
    return found | {"dataset": {s.split: {"name": s.name, "revision": s.revision, "count": len(s)} for s in sources}}, (
        picture(*sampler.first, reference)
    )


def figures_of(ckpt: AnyPath, test: Tensor, samples: int) -> dict[str, Any]:
    """``quality`` of a checkpoint's images by the default sampler against test (N, 1, 28, 28) uint8, on the CPU:
    what can be asked for often. Image i has the seed i and each class in turn."""
    generator, args = Generator.open(ckpt, torch.device("cpu"))
    digit = args.get("only_digit")
    labels = generator.in_turn(samples, digit)
    made = torch.cat(
        [generator(range(start, min(samples, start + BATCH)), labels[start : start + BATCH])
         for start in range(0, samples, BATCH)]
    )  # fmt: skip
    return quality(made, torch.tensor(labels), Reference.of(test), memorisation=False)


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
        return sampling.to_dict() | {"mean": over_runs(figures, mean), "sd": over_runs(figures, sd), "runs": runs}

    def run(self, seed: int, sampling: SamplingConfig) -> dict[str, Any]:
        count, images, began = self.config.samples, [], time.perf_counter()
        said = began
        for start in range(0, count, BATCH):
            stop = min(count, start + BATCH)
            seeds = range(seed * count + start, seed * count + stop)
            images.append(self.generator(seeds, self.labels[start:stop], sampling))
            if time.perf_counter() - said > EVERY_S or stop == count:
                said = time.perf_counter()
                log.info("sampling seed %d, %s: %d/%d images, %.0f/s", seed, told(sampling), stop, count,
                         stop / (said - began))  # fmt: skip
        made, labels = torch.cat(images), torch.tensor(self.labels)
        self.first = self.first or (made, labels)
        seconds = time.perf_counter() - began
        found = quality(made, labels, self.reference)
        log.info("sampling seed %d, %s: FD-LeNet %.2f", seed, told(sampling), found["fd_lenet"])
        return {"seed": seed, "images_per_second": count / seconds} | found


def told(sampling: SamplingConfig) -> str:
    return f"{sampling.sampler}, guidance {sampling.guidance_scale}"


def over_runs(runs: list[dict[str, Any]], of: Callable[[list[float]], float | None]) -> dict[str, Any]:
    """``of`` over each figure's values; lists of figures item by item; None where a value is missing."""

    def joined(values: list[Any]) -> Any:
        if isinstance(values[0], list):
            return [joined(list(items)) for items in zip(*values, strict=True)]
        return None if None in values else of([float(value) for value in values])

    return {name: joined([run[name] for run in runs]) for name in runs[0]}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def sd(values: list[float]) -> float | None:
    """Standard deviation over sampling seeds (n − 1); None for a single one."""
    middle = mean(values)
    return math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None


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
    found = measure(codec)
    write_json(path, {"identity": identity, "floors": found})
    return found


def write_json(path: AnyPath, content: dict[str, Any]) -> None:
    """At once or not at all."""
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
