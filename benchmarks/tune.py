"""What a search costs and whether its objective can be trusted.

  python benchmarks/tune.py                                 every part, embedded digits
  python benchmarks/tune.py --only rank --dataset FOLDER --ae-ckpt ae.pt

start: trials of one epoch through `tune/search.py`, next to one process for each trial (without Ray, the same
code, as many at once). asha: the same random trials with and without early stopping. rank: the objective after
a few epochs, next to a longer training whose samples come from 250 unbounded DDPM steps. Nothing passes or
fails here. Without ``--ae-ckpt`` an MLP with random weights stands in.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import multiprocessing
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm_ray.checkpoints import checkpoint
from ldm_ray.data.examples import read_examples, split
from ldm_ray.data.images import to_uint8
from ldm_ray.data.sources import load_source
from ldm_ray.engine.generator import Generator
from ldm_ray.metrics.frechet import FeatureStatistics, frechet_distance
from ldm_ray.metrics.lenet import Classifiers
from ldm_ray.models import registry
from ldm_ray.models.conditioning import ConditionedDenoiser
from ldm_ray.search import trial
from ldm_ray.search.objective import ClassFrechet
from ldm_ray.settings.sampling import SamplingConfig
from ldm_ray.settings.training import TrainConfig
from ldm_ray.training.tasks import DenoiserTask

SEARCH = Path(__file__).resolve().parents[1] / "tune" / "search.py"
SCHEDULES: list[dict[str, Any]] = [
    {},
    {"beta_end": 1e-2},
    {"beta_end": 5e-3},
    {"beta_end": 2e-3},
    {"beta_start": 1e-3, "beta_end": 5e-2},
    {"beta_schedule": "scaled_linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
]


@dataclasses.dataclass
class Bench:
    """scratch: all output goes there."""

    dataset: str
    ae_ckpt: Path
    scratch: Path
    trials: int
    epochs: int
    batch_size: int
    hidden_dim: int
    slots: int

    def search(self, name: str, *flags: object) -> tuple[float, list[dict[str, Any]]]:
        """(seconds from start to exit, the trials) of ``tune/search.py``."""
        given = {"dataset": self.dataset, "ae-ckpt": self.ae_ckpt, "outdir": self.scratch, "name": name}
        given |= {"batch-size": self.batch_size, "hidden-dim": self.hidden_dim, "device": "cpu"}
        given |= {"search": "random", "num-samples": self.trials, "max-concurrent": self.slots}
        call = [sys.executable, SEARCH, *(f"--{key}={value}" for key, value in given.items()), *flags]
        started = time.perf_counter()
        done = subprocess.run([str(part) for part in call], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the search ended with {done.returncode}:\n{done.stderr[-2000:]}")
        lines = (self.scratch / "tune" / name / "trials.jsonl").read_text().splitlines()
        return time.perf_counter() - started, [json.loads(line) for line in lines]

    def examples(self) -> Path:
        """The folder of latents, encoded by a search of one trial where there is none."""
        if not list(self.scratch.glob("latents/*/manifest.json")):
            self.search("encode", "--epochs=1", "--num-samples=1", "--eval-samples=100")
        return next(self.scratch.glob("latents/*/manifest.json")).parent


def start(bench: Bench) -> None:
    """The same trials of one epoch, from start to exit of everything; latents are there already."""
    folder = bench.examples()
    seconds, trials = bench.search("start", "--epochs=1", "--no-asha", "--eval-samples=200")
    settings = [
        one["settings"] | {"epochs": 1, "batch_size": bench.batch_size, "hidden_dim": bench.hidden_dim}
        for one in trials
    ]

    def alone(values: dict[str, Any]) -> None:
        call = [sys.executable, __file__, "--alone", json.dumps(values), "--examples", str(folder)]
        subprocess.run([*call, "--ae-ckpt", str(bench.ae_ckpt)], check=True, capture_output=True)

    started = time.perf_counter()
    with ThreadPoolExecutor(bench.slots) as pool:
        list(pool.map(alone, settings))
    apart = time.perf_counter() - started
    print(f"start: {len(trials)} trials of one epoch, {bench.slots} at once")
    print(
        f"  within trials                {sum(p['seconds'] for t in trials for p in t['curve']) / bench.slots:>8.1f} s"
    )
    for name, value in (("tune/search.py, start to exit", seconds), ("one process for each", apart)):
        print(f"  {name:<30}{value:>7.1f} s  {3600 * len(trials) / value:>7,.0f} trials an hour", flush=True)
    print(f"  ratio {apart / seconds:.2f}")


def asha(bench: Bench) -> None:
    """What early stopping saves, and whether it finds the same winner."""
    print(f"asha: {bench.trials} random trials of up to {bench.epochs} epochs")
    full: list[dict[str, Any]] = []
    for name, flag in (("full", "--no-asha"), ("asha", "--asha")):
        seconds, trials = bench.search(name, flag, f"--epochs={bench.epochs}", "--eval-samples=1000")
        full = full or trials
        scores = [one["curve"][-1]["objective"] if one["curve"] else float("inf") for one in trials]
        winner = trials[int(np.argmin(scores))]
        order = sorted(one["curve"][-1]["objective"] for one in full)
        own = next(one for one in full if one["settings"] == winner["settings"])["curve"][-1]["objective"]
        points = [point for one in trials for point in one["curve"]]
        inside = sum(point["seconds"] for point in points)
        print(f"  {name}: {seconds:.0f} s, {len(points)} epochs, {inside:.0f} s within trials", end="")
        print(f"; winner {min(scores):.4f}, place {order.index(own) + 1} of the full search", flush=True)


def rank(bench: Bench) -> None:
    """The objective of a few epochs against a longer training, over schedules that differ."""
    jobs = [(bench, values, str(bench.examples())) for values in SCHEDULES]
    with ProcessPoolExecutor(bench.slots, multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(rank_one, jobs))
    print(f"rank: objective after {rows[0]['early']} and {bench.epochs} epochs; then 2000 samples of 250 DDPM steps")
    for values, row in zip(SCHEDULES, rows, strict=True):
        print(
            f"  {', '.join(f'{k} {v}' for k, v in values.items()) or 'default':<38}"
            + "".join(f"{key} {row[key]:>10.4g}  " for key in row if key != "early")
        )
    for key in ("long", "lenet"):
        if key in rows[0]:
            for early in ("short", "whole"):
                print(f"  rank correlation of {early} and {key}: {spearman(rows, early, key):.2f}", flush=True)


def rank_one(job: tuple[Bench, dict[str, Any], str]) -> dict[str, Any]:
    bench, values, folder = job
    torch.set_num_threads(1)
    config = TrainConfig(
        lr=1e-3, batch_size=bench.batch_size, epochs=bench.epochs, hidden_dim=bench.hidden_dim, **values
    )
    data, codec = trial_data(Path(folder), bench.ae_ckpt, config)
    kept: list[trial.Score] = []

    class Kept(trial.Score):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            kept.append(self)

    trial.Score = Kept  # type: ignore[misc,assignment]
    curve = list(trial.run(config, data, torch.device("cpu"), 1000, 40, lambda: False))
    early = max(1, bench.epochs // 3)
    metric, score = ClassFrechet(data.train, data.train_labels), kept[0]
    labels, fitter = metric.balanced_labels(2000), score.fitter
    task, averaged = fitter.task, fitter.averaged
    assert isinstance(task, DenoiserTask) and isinstance(averaged, ConditionedDenoiser)
    generator = Generator(averaged, codec, task.schedule)
    sampling = SamplingConfig(sampler="ddpm", num_inference_steps=250, guidance_scale=1.0)
    made = generator.latents(range(2000), labels.tolist(), sampling)
    images = codec.decode(made)
    row = {"early": early, "short": curve[early - 1]["objective"], "whole": curve[-1]["objective"]}
    return row | {"long": metric(made, labels)} | lenet(images, bench.dataset)


def lenet(images: torch.Tensor, dataset: str) -> dict[str, float]:
    """FD-LeNet against the test images."""
    real, _ = load_source(dataset, "test", Path("hf_cache")).decode()
    network = Classifiers.shipped()
    made, there = (FeatureStatistics.of(network.features(part)) for part in (to_uint8(images.nan_to_num()), real))
    return {"lenet": frechet_distance(made, there)}


def spearman(rows: list[dict[str, Any]], one: str, other: str) -> float:
    ranks = [np.argsort(np.argsort([row[key] for row in rows])) for key in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def trial_data(folder: Path, ae_ckpt: Path, config: TrainConfig) -> tuple[trial.TrialData, Any]:
    """(data as a search has it, the codec)."""
    examples, autoencoder = read_examples(folder), checkpoint.load_autoencoder(ae_ckpt)
    codec = autoencoder.codec.with_statistics(examples.statistics)
    train, held = split(examples, config.val_fraction)
    rows, labels = codec.whiten(examples.vectors), examples.labels
    embedded = checkpoint.embed(dataclasses.replace(autoencoder, codec=codec))
    return trial.TrialData(rows[train], labels[train], rows[held], labels[held], embedded), codec


def alone(settings: dict[str, Any], folder: Path, ae_ckpt: Path) -> None:
    """One trial in a process of its own."""
    torch.set_num_threads(1)
    config = TrainConfig(**settings)
    data, _ = trial_data(folder, ae_ckpt, config)
    print(list(trial.run(config, data, torch.device("cpu"), 200, 40, lambda: False)))


PARTS = {part.__name__: part for part in (start, asha, rank)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="as for ldm_ray.train [digits]")
    parser.add_argument("--ae-ckpt", type=Path, help="autoencoder checkpoint [an MLP with random weights]")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--trials", type=int, default=12, help="trials of a search [12]")
    parser.add_argument("--epochs", type=int, default=9, help="epochs of a whole trial [9]")
    parser.add_argument("--batch-size", type=int, default=512, help="[512]")
    parser.add_argument("--hidden-dim", type=int, default=256, help="[256]")
    parser.add_argument("--slots", type=int, default=2, help="trials at once [2]")
    parser.add_argument("--scratch", type=Path, help="folder with latents of an earlier run [a new one]")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--examples", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        return alone(json.loads(given.alone), given.examples, given.ae_ckpt)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="ldm-ray-bench-") as folder:
        ckpt = given.ae_ckpt or Path(folder) / "autoencoder.pt"
        if not given.ae_ckpt:
            checkpoint.write(ckpt, checkpoint.autoencoder_content(registry.build("mlp", 16), "mlp", {}))
        dataset = str(Path(given.dataset).absolute()) if Path(given.dataset).is_dir() else given.dataset
        sizes = given.trials, given.epochs, given.batch_size, given.hidden_dim, given.slots
        bench = Bench(dataset, ckpt.absolute(), (given.scratch or Path(folder)).absolute(), *sizes)
        for name in given.only:
            PARTS[name](bench)


if __name__ == "__main__":
    main()
