"""Checks a dataset: every shard's hash, and random images made again."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm_ray.checkpoints.checkpoint import file_sha256
from ldm_ray.checkpoints.choose import load
from ldm_ray.data.images import encode_pngs
from ldm_ray.dataset.finish import SUMS, sums
from ldm_ray.dataset.formats import Row, rows
from ldm_ray.dataset.request import MANIFEST, Request, read_manifest, rebuild
from ldm_ray.dataset.shards import Record, file_of, read_record
from ldm_ray.devices.device import pick_device
from ldm_ray.engine.generator import Generator, fingerprint_of
from ldm_ray.files.paths import to_path
from ldm_ray.files.store import Store
from ldm_ray.settings.datasets import VerifyConfig
from ldm_ray.settings.errors import ConfigError, DataError
from ldm_ray.terminal.progress import Progress

SHOWN = 10
log = logging.getLogger(__name__)


def verify_dataset(folder: str, config: VerifyConfig) -> int:
    """Prints what was found; 0 when all is right, 1 otherwise. ConfigError when it cannot be checked."""
    store = Store(folder)
    manifest = read_manifest(store)
    if manifest is None:
        raise ConfigError(f"{store} has no {MANIFEST}: it is no dataset of python -m ldm_ray.generate")
    request = rebuild(manifest, store)
    picked = pick(request, config)
    generator = open_generator(request, manifest, config) if picked else None
    records, wrong, compared = {}, [], 0
    with Progress("checking shards", request.num_shards) as progress:
        for number in range(request.num_shards):
            found = check_shard(store, request, number, picked.get(number, []), generator)
            progress.advance()
            if isinstance(found, str):
                wrong.append(found)
            else:
                records[number] = found
                compared += len(picked.get(number, []))
    if not wrong and SUMS in store.sizes() and store.read(SUMS).decode() != sums(records):
        wrong.append(f"{SUMS} is not that of the shards")
    for line in wrong[:SHOWN]:
        print(line)
    if wrong:
        more = f"and {len(wrong) - SHOWN} more; " if len(wrong) > SHOWN else ""
        print(f"{more}delete the files named and run the same generate command again to make them anew")
        return 1
    done = "" if SUMS in store.sizes() else f", but it is not finished: {SUMS} is missing"
    print(f"{request.num_shards:,} shards with {request.count:,} images have the bytes that were written{done}")
    if compared:
        print(f"{compared:,} images made again have the same bytes")
    return 0


def pick(request: Request, config: VerifyConfig) -> dict[int, list[int]]:
    """Random positions by their shards."""
    rng = random.Random(config.seed)
    picked: dict[int, list[int]] = {}
    for position in sorted(rng.sample(range(request.count), min(config.sample, request.count))):
        picked.setdefault(position // request.shard_size, []).append(position)
    return picked


def open_generator(request: Request, manifest: Mapping[str, Any], config: VerifyConfig) -> Generator:
    """The dataset's generator. ConfigError when checkpoint or device is not the one that it was made with."""
    device = pick_device(config.device or manifest.get("device"))
    if fingerprint_of(device, request.sampling.precision) != request.engine:
        raise ConfigError(
            f"images made by this device ({device.type}) and PyTorch may differ in their last bits from those "
            f"there ({manifest.get('device')}, torch {manifest['versions'].get('torch')}): see --sample 0, hashes alone"
        )
    path = to_path(config.ckpt or manifest["ckpt"])
    if not path.is_file():
        raise ConfigError(f"the checkpoint {path} is not there: name it by --ckpt, or check the hashes by --sample 0")
    if file_sha256(path) != request.checkpoint_sha256:
        raise ConfigError(f"{path} is not the dataset's checkpoint, SHA-256 {request.checkpoint_sha256}: see --ckpt")
    ae_ckpt = config.ae_ckpt or manifest.get("ae_ckpt")
    model = load(path, to_path(ae_ckpt) if ae_ckpt else None, force=True, search=[path.parent])
    if model.autoencoder_sha256 != request.autoencoder_sha256:
        raise ConfigError(f"the dataset's autoencoder has SHA-256 {request.autoencoder_sha256}: name it by --ae-ckpt")
    return Generator.of(model, device)


def check_shard(
    store: Store, request: Request, number: int, positions: list[int], generator: Generator | None
) -> Record | str:
    """Its record, or what is wrong with it."""
    name = file_of(request, number)
    record = read_record(store, request, number)
    if record is None:
        return f"{name} was not committed"
    try:
        data = store.read(name)
    except OSError:
        return f"{name} is missing"
    if hashlib.sha256(data).hexdigest() != record.sha256:
        return f"{name} is not the file that was written: its SHA-256 differs"
    first, last = request.span(number)
    if not positions and request.format != "png":
        return record
    try:
        there = list(rows(data, request.format, store, request.stem(number), first))
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{name} lists a file that cannot be read: {error}"
    if [row.position for row in there] != list(range(first, last)):
        return f"{name} does not hold the positions {first} to {last - 1}"
    if generator is None or not positions:
        return record
    return compare(request, name, [there[position - first] for position in positions], generator) or record


def compare(request: Request, name: str, there: list[Row], generator: Generator) -> str | None:
    """Makes these rows again; what differs, if anything."""
    for row in there:
        seed = request.seeds.rows(row.position, row.position + 1)
        from_file = request.labels.rule.startswith("file:")
        label = row.label if from_file else int(request.labels.rows(row.position, seed)[0])
        if (row.seed, row.label) != (int(seed[0]), label):
            return (
                f"{name}: position {row.position} has seed {row.seed} and label {row.label}, not {seed[0]} and {label}"
            )
    images = generator([row.seed for row in there], [row.label for row in there], request.sampling)
    for row, png in zip(there, encode_pngs(images[:, 0].numpy()), strict=True):
        if row.png != png:
            return (
                f"{name}: the image of position {row.position} (seed {row.seed}, label {row.label}) comes out otherwise"
            )
    if request.save_latents:
        latents = generator.latents([row.seed for row in there], [row.label for row in there], request.sampling)
        if not np.array_equal(np.array([row.latent for row in there], np.float32), latents.cpu().numpy()):
            return f"{name}: latents come out otherwise"
    return None
