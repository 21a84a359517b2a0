"""Shards of generated images with Ray Data: a pool of actors, each of which makes and commits whole shards."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data  # before Ray starts: its import sets its loggers up
import torch
from ray.exceptions import RayError

from ldm_ray.dataset.shards import Job, Record
from ldm_ray.distributed.encode import cause_of
from ldm_ray.distributed.gpus import Share, check_gpus, check_worker
from ldm_ray.engine.generator import fingerprint_of


class Worker:
    """An actor: a row with a shard's number in, its record and the seconds it took out."""

    def __init__(self, shared: list[ray.ObjectRef], device: str) -> None:
        check_worker()
        torch.set_num_threads(1)  # an actor for each core does more than threads do
        job: Job = ray.get(shared[0])
        self.make = job.maker(device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        made: list[dict[str, Any]] = []
        for number in batch["shard"].to_pylist():
            started = time.perf_counter()
            record, new = self.make(number)
            made.append(dataclasses.asdict(record) | {"new": new, "seconds": time.perf_counter() - started})
        return pa.Table.from_pylist(made)


def pool_size(given: int | None, shards: int, device: str, share: Share) -> int:
    """Workers: as asked for, else as many as fit on the GPUs or one per CPU core; no more than shards or than fit."""
    room = 1 if device == "mps" else share.room()
    return max(1, min(given or room, room, shards))


def where(device: str | None, precision: str, share: Share) -> tuple[str, str]:
    """(device, the generator's fingerprint on it) of the cluster's workers; the command's own node may have no GPU.

    Raises ConfigError where a worker's GPU cannot be used.
    """
    if not share:
        kind = "mps" if device == "mps" else "cpu"
        return kind, fingerprint_of(torch.device(kind), precision)

    check_gpus(share)

    @ray.remote(**share.options())
    def ask() -> str:
        return fingerprint_of(torch.device("cuda"), precision)

    return "cuda", ray.get(ask.remote())


def generate(
    job: Job, missing: Sequence[int], workers: int, device: str, share: Share
) -> Generator[tuple[Record, bool, float], None, None]:
    """(record, whether it was made now, seconds) of each missing shard as it is committed, in any order.

    A worker that is killed is started again and its shard made anew. Raises LdmError as the worker raised it.
    """
    blocks = [pa.table({"shard": pa.array([number], pa.int64())}) for number in missing]  # one shard, one task
    done = ray.data.from_arrow(blocks).map_batches(
        Worker,
        fn_constructor_args=([ray.put(job)], device),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        **share.options(),
    )
    try:
        for part in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            assert isinstance(part, pa.Table)
            for row in part.to_pylist():
                new, seconds = row.pop("new"), row.pop("seconds")
                yield Record(**row), new, seconds
    except RayError as error:
        raise cause_of(error) from None
