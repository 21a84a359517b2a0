"""The trials of a search on Ray Tune: what they share, who suggests them, who stops them."""

from __future__ import annotations

import logging
import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from ldm_ray.checkpoints.checkpoint import embed
from ldm_ray.data.examples import Examples, read_examples, split
from ldm_ray.distributed.cluster import check_shared, resources
from ldm_ray.distributed.fit import StopRequest
from ldm_ray.distributed.gpus import check_gpus, shared_out
from ldm_ray.distributed.trials import OBJECTIVE, Setup, run_trial
from ldm_ray.distributed.watch import Scribe, StopFile, Watch
from ldm_ray.search.objective import ClassFrechet
from ldm_ray.search.records import Records, SearchPaths, Trial
from ldm_ray.search.space import SearchConfig, Values, default_of, planned
from ldm_ray.settings.errors import ConfigError

log = logging.getLogger("ldm_ray.tune")
GPU_SHARE = 0.25
MAX_FAILURES = 2  # restarts of a trial whose worker was lost
SETTINGS = "settings"  # the key of a Tune configuration that holds a trial's settings


class Engine:
    """The data of a search, encoded and split once, and the objective that real latents reach (``floor``)."""

    def __init__(self, config: SearchConfig, paths: SearchPaths, latents: Any) -> None:
        """latents: of ``pipeline.latents_of``."""
        self.config, self.paths = config, paths
        check_shared(paths.folder.parents[1])
        examples, autoencoder = read_examples(latents.folder), latents.whitened
        train_rows, held_rows = split(examples, config.val_fraction)
        vectors = autoencoder.codec.cpu().whiten(examples.vectors)  # (N, D)
        whitened = Examples(vectors, examples.labels, examples.index, examples.manifest)
        train, held = whitened.take(train_rows), whitened.take(held_rows)
        self.arrays = {
            "train": train.vectors.numpy(),
            "train_labels": train.labels.numpy(),
            "held": held.vectors.numpy(),
            "held_labels": held.labels.numpy(),
        }
        self.autoencoder, self.class_names = embed(autoencoder), latents.source.class_names
        metric = ClassFrechet(held.vectors, held.labels)
        if metric.pooled:
            log.info("too few held-out images for each class: all classes are compared as one")
        self.floor = metric(*like(train, metric.balanced_labels(config.eval_samples)))

    def run(self, records: Records) -> int:
        """Runs the trials that are left; the exit code: 0, or 128 + the signal that stopped them."""
        config, stop = self.config, self.paths.stop
        todo = left(config, records)
        count = config.num_samples - len(records.settled) if todo is None else len(todo)
        if count <= 0:
            log.info("all %d trials are done", len(records.settled))
            return 0
        stop.unlink(missing_ok=True)
        tuner = self.tuner(records, todo, count)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                tuner.fit()
            except BaseException as error:  # told to the main thread
                failure.append(error)

        thread = threading.Thread(target=work, daemon=True)
        watch = Watch(records, len(records.settled) + count, config.budget_s(), stop)
        with StopRequest(stop, "the trials are asked to stop") as request:
            thread.start()
            watch.until(thread)
        records.close()
        if failure:
            raise failure[0]
        if watch.out_of_time:
            log.info("the time budget of %s is used up", config.time_budget)
        return 128 + request.received if request.received and len(records.settled) < watch.total else 0

    def tuner(self, records: Records, todo: list[dict[str, Any]] | None, count: int) -> tune.Tuner:
        """todo: the settings of the trials, or None where Optuna suggests them."""
        config = self.config
        needs, device, slots = self.needs()
        base = {k: v for k, v in config.train_config().to_dict().items() if k not in config.space()}
        setup = Setup(
            base=base | {"epochs": config.epochs},
            device=device,
            threads=config.cpus_per_trial,
            samples=config.eval_samples,
            steps=config.eval_steps,
            stop=self.paths.stop,
            class_names=self.class_names,
        )
        shared = {"setup": setup, "arrays": self.arrays, "autoencoder": self.autoencoder}
        trainable = tune.with_resources(tune.with_parameters(run_trial, **shared), needs)
        os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
        os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the other one prints boxes even at verbose=0
        for name in ("ray.tune", "ray.train", "ray.air"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # failed trials are told by the records
        log.info("%d trials of up to %d epochs, %d at once on %s", count, config.epochs, slots, device)
        return tune.Tuner(
            trainable,
            param_space={} if todo is None else {SETTINGS: tune.grid_search(todo)},
            tune_config=tune.TuneConfig(
                num_samples=count if todo is None else 1,
                search_alg=optuna_search(config, records) if todo is None else None,
                scheduler=asha(config, records.settled) if config.asha else None,
                max_concurrent_trials=slots,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=f"{time.time_ns()}",
                storage_path=str(self.paths.folder / "ray"),
                stop=StopFile(str(self.paths.stop)),
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                callbacks=[Scribe(records, config.epochs, self.paths.stop)],
                verbose=0,
            ),
        )

    def needs(self) -> tuple[dict[str, float], str, int]:
        """(resources of a trial, its device, how many fit at once). ConfigError where not even one does."""
        config, (cores, gpus) = self.config, resources()
        share = shared_out(config.device, config.gpus_per_trial, config.accelerator_type, "--gpus-per-trial", GPU_SHARE)
        check_gpus(share)
        slots = cores // config.cpus_per_trial
        if share:
            slots = min(slots, share.room())
        if slots < 1:
            raise ConfigError(
                f"a trial takes {config.cpus_per_trial} cores and {share.gpus:g} GPUs; "
                f"the cluster has {cores} and {gpus}"
            )
        device = "cuda" if share else "mps" if config.device == "mps" else "cpu"
        return {"cpu": config.cpus_per_trial, **share.bundle()}, device, min(config.max_concurrent or slots, slots)


def left(config: SearchConfig, records: Records) -> list[dict[str, Any]] | None:
    """The settings of a random or grid search that no settled trial has; None where Optuna suggests."""
    todo = planned(config)
    if todo is not None:
        for trial in records.settled:
            if trial.settings in todo:
                todo.remove(trial.settings)
    return todo


def like(examples: Examples, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Real examples in place of samples: (vectors, labels), at most as many of each class as in labels (M,)."""
    rows = [(examples.labels == label).nonzero()[:count, 0] for label, count in zip(*counted(labels), strict=True)]
    part = examples.take(torch.cat(rows))
    return part.vectors, part.labels


def counted(labels: torch.Tensor) -> tuple[list[int], list[int]]:
    values, counts = labels.unique(return_counts=True)
    return values.tolist(), counts.tolist()


def asha(config: SearchConfig, past: list[Trial]) -> ASHAScheduler:
    """Asynchronous successive halving (Li et al., arXiv:1810.05934) that has seen the trials of the past."""
    scheduler = ASHAScheduler(
        time_attr="training_iteration",
        metric=OBJECTIVE,
        mode="min",
        max_t=config.epochs,
        grace_period=min(config.grace_epochs, config.epochs),
        reduction_factor=config.reduction_factor,
    )
    for trial in past:
        seen: Any = SimpleNamespace(trial_id=f"past-{trial.number}")
        scheduler.on_trial_add(None, seen)  # type: ignore[arg-type]
        for epoch, point in enumerate(trial.curve, start=1):
            result = {"training_iteration": epoch, OBJECTIVE: point["objective"]}
            scheduler.on_trial_result(None, seen, result)  # type: ignore[arg-type]
    return scheduler


def optuna_search(config: SearchConfig, records: Records) -> OptunaSearch:
    """Optuna's tree-structured Parzen estimator, told of the settled trials; interrupted ones come first."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space, settled = config.space(), records.settled
    first = [trial.settings for trial in records.interrupted]
    default = default_of(space)
    if default is not None and not records.trials:
        first.append(default)
    search = OptunaSearch(
        space={f"{SETTINGS}/{name}": distribution(values) for name, values in space.items()},
        metric=OBJECTIVE,
        mode="min",
        points_to_evaluate=[prefixed(settings) for settings in first],
        seed=config.seed + len(settled),
    )
    for trial in settled:
        value = float("inf") if trial.objective is None else trial.objective
        search.add_evaluated_point(prefixed(trial.settings), value)
    return search


def prefixed(settings: dict[str, Any]) -> dict[str, Any]:
    return {f"{SETTINGS}/{name}": value for name, value in settings.items()}


def distribution(values: Values) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    return (
        CategoricalDistribution(values.choices)
        if values.choices
        else FloatDistribution(values.low, values.high, log=values.log)
    )
