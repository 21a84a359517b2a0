"""A trial of a search as a Ray Tune function. What it computes is ``training/trial.py``."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import tune

from ldm_ray.data.classes import numbered
from ldm_ray.distributed.gpus import check_worker
from ldm_ray.search import trial
from ldm_ray.search.trial import Diverged, TrialData
from ldm_ray.settings.diffusion import canonical
from ldm_ray.settings.training import TrainConfig

OBJECTIVE = "objective"


@dataclass(frozen=True)
class Setup:
    """What all trials of a search share. base: the settings that are not searched; stop: the file whose
    existence ends the search; samples, steps: of the objective; class_names: of the images."""

    base: dict[str, Any]
    device: str
    threads: int
    samples: int
    steps: int
    stop: Path
    class_names: tuple[str, ...] = numbered(10)


def run_trial(config: dict[str, Any], setup: Setup, arrays: dict[str, np.ndarray], autoencoder: dict[str, Any]) -> None:
    """Trains with ``config["settings"]`` and reports after every epoch (see ``trial.run``).

    arrays: the tensors of ``TrialData`` by name, which lie in the object store once per machine and are read
    only. A trial that diverged reports an infinite objective with ``failed`` saying why, rather than raise:
    Tune would throw the actor away, and the search algorithm is to learn from it. One that was asked to stop
    within an epoch reports ``interrupted``. The process is used by one
    trial after another, so nothing may be left behind: every random number comes from the configuration's seed.
    """
    check_worker()
    torch.set_num_threads(setup.threads)
    with warnings.catch_warnings():  # torch warns that the arrays are read-only; nothing writes to them
        warnings.simplefilter("ignore")
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    train, device = TrainConfig(**{**setup.base, **canonical(config["settings"])}), torch.device(setup.device)
    data = TrialData(**tensors, autoencoder=autoencoder, class_names=setup.class_names)
    epoch = 0
    try:
        for metrics in trial.run(train, data, device, setup.samples, setup.steps, setup.stop.exists):
            epoch = metrics["epoch"]
            tune.report(metrics)
    except Diverged as error:
        tune.report({"epoch": epoch + 1, OBJECTIVE: math.inf, "failed": f"diverged: {error}"})
        return
    if epoch < train.epochs:
        tune.report({"epoch": epoch, OBJECTIVE: math.inf, "interrupted": True})
