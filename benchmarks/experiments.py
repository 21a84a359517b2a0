"""Training recipes side by side: each row of flags trained and measured in this process, without Ray.

  python benchmarks/experiments.py --dataset FOLDER --model mlp "" "--lr 1e-3" "--epochs 40"
  python benchmarks/experiments.py --dataset FOLDER --ae-ckpt ae.pt "" "--no-stratified" "--recipe classic"

A row is a text of flags of ``ldm_ray.train``, or with --model of ``ldm_ray.train_autoencoder``; the loop is theirs.
Printed for each: seconds of training, FD-LeNet against the test images, accuracy of the second classifier; for an
autoencoder of decode(encode(test)) and of decode(encode(10,000 training images)), which are floors (b) and (c); for a
denoiser of 10,000 samples, and their recall. ``--every 5`` gives quality against seconds: the clock stands still
while it measures.
"""

import argparse
import itertools
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldm_ray.checkpoints import checkpoint
from ldm_ray.data.examples import SPLIT_SEED
from ldm_ray.data.sources import load_source
from ldm_ray.data.statistics import LatentStatistics
from ldm_ray.engine.generator import Generator
from ldm_ray.files.paths import cache_dir
from ldm_ray.metrics.floors import chosen, encode, reconstruct
from ldm_ray.metrics.quality import Reference, quality
from ldm_ray.models.codec import LatentCodec
from ldm_ray.settings.sampling import DEFAULT_STEPS, SAMPLERS, SamplingConfig
from ldm_ray.settings.training import AutoencoderConfig, RunConfig, TrainConfig
from ldm_ray.terminal.flags import Parser, parse_config
from ldm_ray.training.fitter import Fitter
from ldm_ray.training.tasks import AutoencoderTask, DenoiserTask, Task, build_task

CPU = torch.device("cpu")
SAMPLES = 10_000
SHOWN = ("fd_lenet", "accuracy", "recall")


def fitted(
    config: RunConfig,
    data: torch.Tensor,
    labels: torch.Tensor,
    embedded: Any,
    every: int = 0,
    look: Callable[[Task, Fitter, float], None] = lambda *_: None,
) -> tuple[Any, Fitter, float]:
    """(task, fitter after all epochs, seconds) on all rows but those that a run would hold out.

    look(task, fitter, seconds so far): after every ``every`` epochs but the last, with the clock stopped.
    """
    task = build_task(config, CPU, embedded)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    rows = order[round(len(labels) * config.val_fraction) :]
    fitter = Fitter(task, task.model, config, data[rows], labels[rows], len(rows), 0, 1, CPU)
    seconds = 0.0
    while fitter.epoch < config.epochs:
        started = time.perf_counter()
        fitter.run_epoch(lambda _: False)
        fitter.end_epoch()
        seconds += time.perf_counter() - started
        if every and fitter.epoch % every == 0 and fitter.epoch < config.epochs:
            look(task, fitter, seconds)
    return task, fitter, seconds


def autoencoder_row(config: AutoencoderConfig, train: Any, test: Any, reference: Reference, save: str | None) -> dict:
    task, _, seconds = fitted(config, train[0], train[1], None)
    assert isinstance(task, AutoencoderTask)
    if save:
        found = checkpoint.autoencoder_content(task.autoencoder, config.model, config.to_dict(), epoch=config.epochs)
        checkpoint.write(Path(save), found)
    codec = LatentCodec(task.autoencoder, config.model)
    told: dict[str, Any] = {"seconds": round(seconds)}
    for name, (images, labels) in (("b", test), ("c", chosen(train, SAMPLES))):
        figures = quality(reconstruct(codec, images), labels, reference, memorisation=False)
        told |= {name: round(figures["fd_lenet"], 2), f"accuracy_{name}": round(figures["accuracy"], 4)}
        told[f"recall_{name}"] = round(figures["recall"], 3)
    return told


def denoiser_row(config: TrainConfig, raw: Any, codec: LatentCodec, reference: Reference, given: Any) -> dict:
    identity = LatentStatistics.identity(codec.latent_dim)
    codec = codec.with_statistics(LatentStatistics.of(raw[0]) if config.whiten else identity)
    autoencoder = checkpoint.AutoencoderCheckpoint(codec=codec, path="", sha256="")

    def told(task: Task, fitter: Fitter, seconds: float) -> dict[str, Any]:
        assert isinstance(task, DenoiserTask)
        make = Generator(fitter.averaged, codec, task.schedule, CPU, config.prediction_type)  # type: ignore[arg-type]
        labels = torch.arange(SAMPLES) % 10
        found: dict[str, Any] = {"epoch": fitter.epoch, "seconds": round(seconds, 1)}
        for steps, scale in itertools.product(given.steps, given.guidance_scale):
            sampling = SamplingConfig(sampler=given.sampler, num_inference_steps=steps, guidance_scale=scale)
            figures = quality(make(range(SAMPLES), labels.tolist(), sampling), labels, reference, memorisation=False)
            taken = steps or DEFAULT_STEPS[given.sampler]
            found[f"{taken} steps, g{scale:g}"] = {name: round(figures[name], 4) for name in SHOWN}
        return found

    def look(task: Task, fitter: Fitter, seconds: float) -> None:
        print(f"    {json.dumps(told(task, fitter, seconds))}", flush=True)

    task, fitter, seconds = fitted(
        config, codec.whiten(raw[0]), raw[1], checkpoint.embed(autoencoder), given.every, look
    )
    if given.save:
        checkpoint.write(Path(given.save), task.content(fitter.averaged, epoch=config.epochs))
    return told(task, fitter, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="flags of a run, as one text")
    parser.add_argument("--dataset", default="auto")
    parser.add_argument("--model", choices=("mlp", "conv"), help="train this autoencoder")
    parser.add_argument("--ae-ckpt", type=Path, help="train denoisers over this autoencoder")
    parser.add_argument("--save", help="write the last model here")
    parser.add_argument("--guidance-scale", type=float, nargs="+", default=[SamplingConfig().guidance_scale])
    parser.add_argument("--sampler", choices=SAMPLERS, default=SamplingConfig().sampler)
    parser.add_argument("--steps", type=int, nargs="+", default=[None], help="of the sampler [its own]")
    parser.add_argument("--every", type=int, default=0, help="measure denoisers also every so many epochs")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if bool(given.model) == bool(given.ae_ckpt):
        parser.error("give --model or --ae-ckpt")
    torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)  # as in training/fit.py
    train, test = (load_source(given.dataset, split, cache_dir(None)).decode() for split in ("train", "test"))
    reference = Reference.of(test[0])
    if given.ae_ckpt:
        codec = checkpoint.load_autoencoder(given.ae_ckpt).codec
        codec = codec.with_statistics(LatentStatistics.identity(codec.latent_dim))
        raw = encode(codec, train[0]), train[1]
    for row in given.rows:
        if given.model:
            flags = ["--model", given.model, *shlex.split(row)]
            told = autoencoder_row(parse_config(AutoencoderConfig, Parser(), flags), train, test, reference, given.save)
        else:
            config = parse_config(TrainConfig, Parser(), shlex.split(row))
            told = denoiser_row(config, raw, codec, reference, given)
        print(f"{row or '(none)':50s} {json.dumps(told)}", flush=True)


if __name__ == "__main__":
    main()
