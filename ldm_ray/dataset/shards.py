"""Making a shard and committing it.

A shard's record (its SHA-256, rows and bytes) is written first, then its file, which appears with all of its
bytes or not at all: the shard is committed when the file is there and has the recorded size. Whatever is killed
in between leaves at most a record without a file, and the shard is made again, with the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ldm_ray.checkpoints.checkpoint import DiffusionCheckpoint
from ldm_ray.dataset.formats import ENDINGS, Shard, encode
from ldm_ray.dataset.request import Request
from ldm_ray.engine.generator import Generator
from ldm_ray.files.store import Store
from ldm_ray.settings.errors import ConfigError, DataError

RECORDS = ".committed"
BATCH = {"cpu": 2048, "mps": 2048, "cuda": 65_536}
READERS = 16


@dataclass(frozen=True)
class Record:
    """What is known of a shard: ``file`` under the dataset's folder, its rows, bytes and SHA-256."""

    shard: int
    file: str
    rows: int
    bytes: int
    sha256: str


class ShardMaker:
    """maker(shard number) → (its record, whether it was made now). What is committed is not made again."""

    def __init__(self, generator: Generator, request: Request, store: Store, batch_size: int | None = None) -> None:
        """ConfigError when this machine's generator would not give the bytes that the request fixes."""
        engine = generator.fingerprint_in(request.sampling.precision)
        if engine != request.engine:
            raise ConfigError(
                f"this worker's device or PyTorch ({generator.device.type}, torch {torch.__version__}, fingerprint "
                f"{engine}) makes other bytes than the dataset's ({request.engine}): use one kind"
            )
        self.generator, self.request, self.store = generator, request, store
        self.batch_size = batch_size or BATCH[generator.device.type]

    def __call__(self, number: int) -> tuple[Record, bool]:
        """DataError when it cannot be written, CheckpointError on an image that is not finite."""
        found = read_record(self.store, self.request, number)
        if found is not None and is_there(self.store, found):
            return found, False
        stem = self.request.stem(number)
        data = encode(self.shard(number), self.request.format, self.request.labels.num_classes, self.store, stem)
        first, last = self.request.span(number)
        record = Record(
            shard=number,
            file=file_of(self.request, number),
            rows=last - first,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        self.store.write(record_of(self.request, number), json.dumps(dataclasses.asdict(record)).encode())
        self.store.write(record.file, data)
        return record, True

    def shard(self, number: int) -> Shard:
        """Its images, by batches."""
        first, last = self.request.span(number)
        seeds = self.request.seeds.rows(first, last)
        labels = self.request.labels.rows(first, seeds)
        images, latents = [], []
        for start in range(0, len(seeds), self.batch_size):
            rows = slice(start, start + self.batch_size)
            made, kept = self.make(seeds[rows], labels[rows])
            images.append(made)
            latents.append(kept)
        kept_latents = np.concatenate(latents) if self.request.save_latents else None
        return Shard(first, np.concatenate(images), seeds, labels, kept_latents)

    def make(self, seeds: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(images (n, H, W) uint8, latents (n, D) float32, empty unless they are to be kept)."""
        if not self.request.save_latents:
            images = self.generator(seeds.tolist(), labels.tolist(), self.request.sampling)
            return images[:, 0].numpy(), np.empty(0, np.float32)
        latents = self.generator.latents(seeds.tolist(), labels.tolist(), self.request.sampling)
        return self.generator.decode(latents)[:, 0].numpy(), latents.cpu().numpy()


@dataclass(frozen=True)
class Job:
    """What a worker needs, as it can be sent to one."""

    model: DiffusionCheckpoint
    request: Request
    store: Store
    batch_size: int | None

    def maker(self, device: str) -> ShardMaker:
        return ShardMaker(Generator.of(self.model, device), self.request, self.store, self.batch_size)


def file_of(request: Request, number: int) -> str:
    return f"data/{request.stem(number)}{ENDINGS[request.format]}"


def record_of(request: Request, number: int) -> str:
    return f"{RECORDS}/{request.stem(number)}.json"


def read_record(store: Store, request: Request, number: int) -> Record | None:
    """The record of a shard, None where there is no usable one. It does not say that the shard is there."""
    try:
        record = Record(**json.loads(store.read(record_of(request, number))))
    except (OSError, ValueError, TypeError):
        return None
    return record if record.file == file_of(request, number) else None


def is_there(store: Store, record: Record) -> bool:
    return store.fs.get_file_info(store.path(record.file)).size == record.bytes


def committed(store: Store, request: Request) -> dict[int, Record]:
    """The records of all committed shards, by two listings and one small file each."""
    sizes = store.sizes("data", recursive=request.format == "png")
    records = set(store.sizes(RECORDS))
    numbers = [
        number
        for number in range(request.num_shards)
        if file_of(request, number) in sizes and record_of(request, number) in records
    ]
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda number: read_record(store, request, number), numbers)
        return {record.shard: record for record in found if record and sizes[record.file] == record.bytes}


def load(store: Store, record: Record) -> bytes:
    """A committed shard's file. DataError when it cannot be read."""
    try:
        return store.read(record.file)
    except OSError as error:
        raise DataError(f"{store}/{record.file} cannot be read: {error.strerror or error}") from None
