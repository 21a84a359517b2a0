"""A training run on Ray Train, watched from the command that started it."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import signal
import sys
import threading
import time
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer, get_device, prepare_model
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from ldm_ray.checkpoints import checkpoint
from ldm_ray.data.sources import ImageSource
from ldm_ray.devices.device import cpu_threads
from ldm_ray.distributed.cluster import check_shared, cores_of_each, first_line, is_local
from ldm_ray.distributed.gpus import check_gpus, check_worker, share_of
from ldm_ray.distributed.validation import FIGURE, reported, validation_of
from ldm_ray.files.paths import AnyPath, RemotePath, look_every, write_bytes
from ldm_ray.files.records import read_records
from ldm_ray.settings.errors import DiskError, LdmError
from ldm_ray.terminal.signals import on_first
from ldm_ray.training.fit import Job, Place, fit

log = logging.getLogger(__name__)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
WATCH_S = 0.2
GROW_S = 15.0  # how often --num-workers MIN-MAX looks for room to grow; growing restarts from the last checkpoint


def train_worker(settings: dict[str, Any]) -> None:
    """What Ray Train runs on every worker."""
    check_worker()  # else Ray Train takes the CPU in silence
    torch.set_num_threads(settings["threads"])
    context = ray.train.get_context()
    device = torch.device("mps") if settings["mps"] else get_device()
    world = context.get_world_size()
    place = Place(context.get_world_rank(), world, device, prepare_model if world > 1 else lambda model: model)
    job = settings["job"]
    try:
        fit(job, place, functools.partial(reported, job.config, job.paths, place.rank == 0))
    except OSError as error:
        if error.errno in FULL:
            raise DiskError(f"{error.filename or job.paths.outdir}: {error.strerror}") from None
        raise


class EndsAtOnce(UserCallback):
    """No other attempt where it would meet the same full disk."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, DiskError):
                raise error


class Trainer(TorchTrainer):
    """Ray's, without two of the actors that it starts for every run (3 s of a core): workers read their examples
    themselves, and a Ray of this command alone ends with it, placement groups and all."""

    def _create_default_callbacks(self) -> list[Any]:
        idle = (DatasetsCallback, PlacementGroupCleanerCallback) if is_local() else (DatasetsCallback,)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, idle)]  # type: ignore[misc]


def run(job: Job, test: ImageSource | None = None, goes_on: bool = False) -> int:
    """Trains to the end; the command's exit code: 0, or 128 + the signal that stopped it.

    test: what ``--evaluate-every`` compares with. goes_on: the command has more to do, so that a signal stops it even
    where training has just ended.

    Raises LdmError when training diverged or workers were lost too often.
    """
    paths, config = job.paths, job.config
    check_shared(paths.outdir)
    low, high = config.worker_range()
    share = share_of(config)
    check_gpus(share)
    cores = cores_of_each(high)
    paths.runs.mkdir(parents=True, exist_ok=True)
    paths.stop.unlink(missing_ok=True)
    paths.diverged.unlink(missing_ok=True)
    storage = paths.outdir / "ray"
    trainer = Trainer(  # type: ignore[call-arg]  # its type is that of Ray Train's first version
        train_worker,
        train_loop_config={"job": job, "threads": cpu_threads(cores), "mps": config.device == "mps"},
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=high if low == high else (low, high),  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=GROW_S,
            use_gpu=bool(share),
            resources_per_worker={"GPU": share.gpus} if share else {"CPU": cores},
            accelerator_type=share.kind,
        ),
        # NCCL refuses two workers on one GPU
        torch_config=TorchConfig(backend="gloo" if 0 < share.gpus < 1 else None),
        run_config=RunConfig(
            # Ray's own state resumes by name whatever the settings; ours is latest.pt, so the name is new each time
            name=f"{paths.name}-{time.time_ns()}",
            storage_path=storage.place if isinstance(storage, RemotePath) else str(storage),
            storage_filesystem=storage.filesystem if isinstance(storage, RemotePath) else None,
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=[EndsAtOnce()],  # type: ignore[list-item]
        ),
        validation_config=validation_of(config, paths, test),
    )
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:  # told to the main thread
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    with StopRequest(paths.stop) as request:
        thread.start()
        Watch(job).until(thread)
        code = 128 + request.received if request.received and (goes_on or not finished(job)) else 0
    if "error" in outcome:
        error = failure(outcome["error"], job)
        if not code:
            raise error
        log.error("%s", error)
    elif code:
        log.info("stopped; %s", kept(job))
    if paths.diverged.exists():
        epoch = json.loads(paths.diverged.read_text())["epoch"]
        raise LdmError(
            f"training diverged in epoch {epoch}: the loss is not finite with --lr {config.lr:g}; take a smaller one"
        )
    return code


class StopRequest:
    """Turns the first SIGINT, SIGTERM or SIGUSR1 into the stop file (see ``on_first``)."""

    def __init__(self, file: AnyPath, first: str = "the run is asked to save a checkpoint and to stop") -> None:
        self.file, self.first, self.received = file, first, 0

    def __enter__(self) -> StopRequest:
        self.handlers = on_first(self.ask)
        self.handlers.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.handlers.__exit__(None, None, None)
        self.file.unlink(missing_ok=True)

    def ask(self, number: int) -> None:
        self.received = number
        print(f"\n{signal.Signals(number).name}: {self.first}", file=sys.stderr, flush=True)
        self.file.touch()


class Watch:
    """Prints a line for every epoch, and on a terminal a progress line in between."""

    def __init__(self, job: Job) -> None:
        self.job, self.shown = job, ""
        self.every = look_every(job.paths.metrics, WATCH_S)
        self.measured, self.read = len(read_records(job.paths.quality)), len(read_records(job.paths.metrics))

    def until(self, thread: threading.Thread) -> None:
        while thread.is_alive():
            thread.join(self.every)
            self.look()
        self.look()
        self.line("")

    def look(self) -> None:
        paths, epochs = self.job.paths, self.job.config.epochs
        records = read_records(paths.metrics)
        self.read = min(self.read, len(records))
        for metrics in records[self.read :]:
            self.line("")
            log.info("%s", epoch_line(metrics, epochs))
        self.read = len(records)
        if self.job.config.evaluate_every:
            figures = read_records(paths.quality)
            for row in figures[self.measured :]:
                self.line("")
                log.info("epoch %3d  FD-LeNet %.2f, %.1f %% as asked", row["epoch"], row[FIGURE], 100 * row["accuracy"])
            self.measured = len(figures)
        if sys.stderr.isatty() and paths.progress.exists():
            now = json.loads(paths.progress.read_text())
            left = time.strftime(
                "%M:%S" if now["seconds_left"] < 3600 else "%H:%M:%S", time.gmtime(now["seconds_left"])
            )
            self.line(
                f"epoch {now['epoch']}/{epochs}  step {now['step']}/{now['steps_per_epoch']}  "
                f"loss {now['loss']:.4f}  {now['images_per_s']:,.0f} images/s  {left} left"
            )

    def line(self, text: str) -> None:
        if text != self.shown:
            print("\r\033[K" + text, end="", file=sys.stderr, flush=True)
            self.shown = text


def epoch_line(metrics: dict[str, Any], epochs: int) -> str:
    """One epoch in words."""
    return (
        f"epoch {metrics['epoch']:>3}/{epochs}  train {metrics['train_loss']:.4f}  val {metrics['val_loss']:.4f}  "
        f"{metrics['images_per_s']:>9,.0f} images/s  {metrics['seconds']:.1f} s"
    )


def finished(job: Job) -> bool:
    """Whether the last epoch is recorded."""
    return any(metrics["epoch"] >= job.config.epochs for metrics in read_records(job.paths.metrics)[-1:])


def failure(error: BaseException, job: Job) -> BaseException:
    """A worker's own LdmError as it is, a full disk in words; anything else with how to go on."""
    causes = [*(getattr(error, "worker_failures", None) or {}).values()]
    causes += filter(None, [getattr(error, "controller_failure", None)])
    for cause in causes:
        if isinstance(cause, DiskError) or any(os.strerror(number) in str(cause) for number in FULL):
            text = cause if isinstance(cause, DiskError) else f"{job.paths.outdir}: {first_line(cause)}"
            return DiskError(f"{text}; {kept(job)}")
        if isinstance(cause, LdmError):
            return cause
    details = job.paths.runs / "error.txt"
    write_bytes(details, str(error).encode())
    return LdmError(f"training failed: {first_line((causes or [error])[0])} (all of it: {details}); {kept(job)}")


def kept(job: Job) -> str:
    """Which checkpoint of the run there is, and how to go on."""
    if not job.paths.latest.exists():
        return "no checkpoint was written yet: start it again"
    training = checkpoint.read(job.paths.latest)[0]["training"]
    state = f"after epoch {training['epoch']} of {job.config.epochs}"
    state += f" and {training['step']} steps" if training["step"] else ""
    return f"the last checkpoint, {state}, is kept: go on with --auto-resume"
