"""A whole training run as one worker sees it: resume, epochs, checkpoints, records, stopping."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ldm_ray.checkpoints import checkpoint
from ldm_ray.checkpoints.runs import RunPaths
from ldm_ray.data.examples import read_examples, split
from ldm_ray.files.paths import AnyPath, Mirror, look_every, write_bytes
from ldm_ray.files.records import append_record, read_records, write_records
from ldm_ray.settings.training import RunConfig
from ldm_ray.training.fitter import Fitter
from ldm_ray.training.tasks import Task, build_task

CHECK_EVERY = 20  # steps between looks for a stop request
PROGRESS_S = 0.5


@dataclass(frozen=True)
class Job:
    """What every worker is given. examples: a folder that all of them see, made of ``data``; autoencoder: the embedded
    one of a denoiser."""

    config: RunConfig
    paths: RunPaths
    examples: AnyPath
    data: dict[str, Any]
    autoencoder: dict[str, Any] | None = None


@dataclass(frozen=True)
class Place:
    """Where this worker runs."""

    rank: int
    world: int
    device: torch.device
    wrap: Callable[[nn.Module], nn.Module]  # DDP for several workers


def fit(job: Job, place: Place, report: Callable[[dict[str, Any]], None]) -> None:
    """Trains from the run's latest checkpoint, or from the start, until the end or a stop request.

    report is called on every worker after every epoch and once on stopping, with the same metrics.
    """
    # Adam's moments of weights without gradient (the border's) decay into denormal numbers, which halve a CPU's speed
    torch.set_flush_denormal(True)
    config, first = job.config, place.rank == 0
    task = build_task(config, place.device, job.autoencoder, job.data)
    examples = read_examples(job.examples)
    train_rows, val_rows = split(examples, config.val_fraction)
    mine = examples.take(train_rows[place.rank :: place.world])
    if len(mine) == 0:
        mine = examples.take(train_rows)
    fitter = Fitter(
        task,
        place.wrap(task.model),
        config,
        task.prepare(mine),
        mine.labels,
        len(train_rows),
        place.rank,
        place.world,
        place.device,
    )
    held = examples.take(val_rows)
    val_data, val_labels = task.prepare(held), held.labels
    del examples, mine, held
    best, before, began = {"val_loss": math.inf, "epoch": 0}, 0.0, time.perf_counter()
    if job.paths.latest.exists():
        content, _ = checkpoint.read(job.paths.latest)
        fitter.load(content)
        best, before = content["training"]["best"], content.get("train_seconds", 0.0)
    recorder = Recorder(job.paths, config, fitter) if first else None
    asked_to_stop = StopAsked(job.paths.stop)

    def kept() -> dict[str, Any]:
        """What a checkpoint says of the run so far."""
        return {"best": best, "train_seconds": before + time.perf_counter() - began}

    def pause(step: int) -> bool:
        if recorder:
            recorder.progress(step)
        if step % CHECK_EVERY:
            return False
        return agreed(first and asked_to_stop(), place)

    while fitter.epoch < config.epochs:
        started, from_step = time.perf_counter(), fitter.step
        if not fitter.run_epoch(pause):
            if first:
                save(task, fitter, job, kept(), {}, epoch_file=False)
            report({"stopped": True, "epoch": fitter.epoch, "step": fitter.step})
            return
        images = (fitter.steps_per_epoch - from_step) * config.batch_size
        train_loss = average(fitter.end_epoch(), place)  # reads the loss, so the device has finished
        seconds = time.perf_counter() - started
        metrics: dict[str, Any] = {"epoch": fitter.epoch, "train_loss": train_loss}
        if first and math.isfinite(train_loss):
            metrics |= {
                "val_loss": fitter.validate(val_data, val_labels),
                "lr": fitter.optimizer.param_groups[0]["lr"],
                "images_per_s": images / seconds,
                "seconds": seconds,
                "workers": place.world,
            }
        metrics = shared(metrics, place)
        if not math.isfinite(train_loss) or not math.isfinite(metrics["val_loss"]):
            if recorder:
                recorder.diverged(metrics)
            report({"diverged": True, "epoch": fitter.epoch})
            return
        if metrics["val_loss"] < best["val_loss"]:
            best = {"val_loss": metrics["val_loss"], "epoch": fitter.epoch}
        patience = config.early_stopping_patience
        early = bool(patience) and fitter.epoch - best["epoch"] >= patience
        stop = agreed(first and asked_to_stop(), place)
        last = early or stop or fitter.epoch == config.epochs
        if recorder:
            recorder.epoch(metrics)  # before the checkpoint: a record that is ahead of it goes at the next start
            if last or config.writes(fitter.epoch):
                save(task, fitter, job, kept(), metrics, epoch_file=True, finished=early)
            if config.generate_images:
                task.picture(fitter.averaged, job.paths.sample(fitter.epoch), val_data.to(place.device))
        report(metrics | {"early_stopped": early, "stopped": stop and fitter.epoch < config.epochs})
        if last:
            break
    if recorder:
        recorder.close()


def save(
    task: Task,
    fitter: Fitter,
    job: Job,
    kept: dict[str, Any],
    metrics: dict[str, Any],
    epoch_file: bool,
    finished: bool = False,
) -> None:
    """Writes ``latest.pt`` and, without what only resuming needs, the epoch's own file."""
    paths = job.paths
    rest = {"epoch": fitter.epoch, "global_step": fitter.global_step, "exp_name": paths.name, "metrics": metrics}
    rest |= {"data": job.data, "train_seconds": kept["train_seconds"]}
    rest |= {key: metrics[key] for key in ("train_loss", "val_loss") if key in metrics}
    content = task.content(fitter.averaged, **rest)
    if epoch_file:
        checkpoint.write(paths.checkpoint(fitter.epoch), content)
    training = fitter.state() | {"best": kept["best"], "finished": finished}
    checkpoint.write(paths.latest, content | {"training": training})


class StopAsked:
    """Whether the command wants the run to stop: a file, looked for at most every few seconds in an object store."""

    def __init__(self, file: AnyPath) -> None:
        self.file, self.next, self.every = file, 0.0, look_every(file, 0.0)

    def __call__(self) -> bool:
        now = time.perf_counter()
        if now < self.next:
            return False
        self.next = now + self.every
        return self.file.exists()


class Recorder:
    """The run's records, by the first worker alone: metrics.jsonl, TensorBoard, the progress file."""

    def __init__(self, paths: RunPaths, config: RunConfig, fitter: Fitter) -> None:
        self.paths, self.config, self.fitter = paths, config, fitter
        self.every = look_every(paths.progress, PROGRESS_S)
        self.mirror = Mirror(paths.runs)
        self.board = Board(self.mirror.local, fitter.epoch + 1)
        self.next, self.started, self.first_step = 0.0, time.perf_counter(), fitter.global_step
        epochs = read_records(paths.metrics)
        write_records(paths.metrics, (epoch for epoch in epochs if epoch["epoch"] <= fitter.epoch))

    def progress(self, step: int) -> None:
        """Writes how far training is, twice a second at most, into an object store more rarely."""
        now = time.perf_counter()
        if now < self.next:
            return
        self.next = now + self.every
        fitter, elapsed = self.fitter, now - self.started
        rate = (fitter.global_step - self.first_step) / max(elapsed, 1e-9)
        state = {
            "epoch": fitter.epoch + 1,
            "step": step,
            "steps_per_epoch": fitter.steps_per_epoch,
            "loss": float(fitter.loss_sum) / max(1, step),
            "images_per_s": rate * self.config.batch_size,
            "seconds_left": (fitter.total_steps - fitter.global_step) / max(rate, 1e-9),
        }
        write_bytes(self.paths.progress, json.dumps(state).encode())

    def epoch(self, metrics: dict[str, Any]) -> None:
        append_record(self.paths.metrics, metrics | {"time": time.time()})
        self.board.add(metrics["epoch"], {key: value for key, value in metrics.items() if key != "epoch"})
        self.mirror.send()

    def diverged(self, metrics: dict[str, Any]) -> None:
        """Leaves word for the command; the last good checkpoint stays."""
        write_bytes(self.paths.diverged, json.dumps({"epoch": metrics["epoch"]}).encode())
        self.close()

    def close(self) -> None:
        self.board.close()
        self.mirror.close()


class Board:
    """TensorBoard's event file, written at once: SummaryWriter's thread ends at an error, and its queue then hangs."""

    def __init__(self, folder: Path, first: int) -> None:
        """first: an earlier file's steps from this one on count no more."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self.file = EventsWriter(str(folder / "events"))
        self.file.write_event(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self.file.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def agreed(wish: bool, place: Place) -> bool:
    """The first worker's wish, known to all."""
    return bool(shared(wish, place))


def shared(value: Any, place: Place) -> Any:
    """The first worker's value, on all."""
    if place.world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=place.device if place.device.type == "cuda" else None)
    return box[0]


def average(value: float, place: Place) -> float:
    """The mean over workers."""
    if place.world == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=place.device)
    dist.all_reduce(tensor)
    return float(tensor) / place.world
