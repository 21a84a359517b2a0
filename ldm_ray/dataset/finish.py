"""What a finished dataset has beside its shards: SHA256SUMS, dataset card, preview, and ``images.npz`` on request."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

from ldm_ray.data.images import decode_png, encode_png, grid
from ldm_ray.dataset.formats import features, rows
from ldm_ray.dataset.request import Request
from ldm_ray.dataset.shards import Record, load
from ldm_ray.files.store import Store

SUMS = "SHA256SUMS"
CARD = "README.md"
PREVIEW = "preview.png"
NPZ = "images.npz"
PREVIEWED = 64
PATTERNS = {"parquet": "data/*.parquet", "webdataset": "data/*.tar", "png": "data/**"}


def sums(records: Mapping[int, Record]) -> str:
    """As ``sha256sum -c`` reads it: a line for each shard, in order."""
    return "".join(f"{records[number].sha256}  {records[number].file}\n" for number in sorted(records))


def dataset_hash(records: Mapping[int, Record]) -> str:
    """SHA-256 of SHA256SUMS: one number for all bytes of the dataset."""
    return hashlib.sha256(sums(records).encode()).hexdigest()


def is_finished(store: Store, request: Request, records: Mapping[int, Record]) -> bool:
    """Whether nothing is missing but ``images.npz``."""
    sizes = store.sizes()
    written = {SUMS, CARD, PREVIEW} <= sizes.keys() and sizes[SUMS] == len(sums(records))
    return written and len(records) == request.num_shards


def finish(store: Store, request: Request, records: Mapping[int, Record], manifest: Mapping[str, Any]) -> None:
    """Writes what is missing of card, preview and, last, SHA256SUMS."""
    if is_finished(store, request, records):
        return
    shown = [decode_png(row.png) for row in islice(dataset_rows(store, request, {0: records[0]}), PREVIEWED)]
    store.write(PREVIEW, encode_png(grid(torch.from_numpy(np.stack(shown))[:, None])))
    store.write(CARD, card(request, records, manifest).encode())
    store.write(SUMS, sums(records).encode())


def dataset_rows(store: Store, request: Request, records: Mapping[int, Record]) -> Iterator[Any]:
    """All rows in order, a shard in memory at a time."""
    for number in sorted(records):
        data = load(store, records[number])
        yield from rows(data, request.format, store, request.stem(number), request.span(number)[0])


def card(request: Request, records: Mapping[int, Record], manifest: Mapping[str, Any]) -> str:
    """The dataset card: YAML that the hub and ``datasets`` read, and what the dataset is in words."""
    size = sum(record.bytes for record in records.values())
    names = features(request.labels.num_classes, request.latent_dim if request.save_latents else None)
    classes = "\n".join(f"          '{i}': '{name}'" for i, name in enumerate(names["label"]["names"]))
    info = f"""dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
{classes}
  - name: seed
    dtype: int64
"""
    if request.save_latents:
        info += f"  - name: latent\n    list: float32\n    length: {request.latent_dim}\n"
    info += f"  splits:\n  - name: train\n    num_bytes: {size}\n    num_examples: {request.count}\n"
    told = {
        "images": f"{request.count:,} in {request.num_shards:,} shards of up to {request.shard_size:,}",
        "seeds": short(str(request.seeds)),
        "labels": short(request.labels.rule),
        "sampler": f"{request.sampling.sampler}, {request.sampling.num_inference_steps} steps, "
        f"{request.sampling.timestep_spacing} spacing, eta {request.sampling.eta:g}",
        "guidance": f"{request.sampling.guidance_scale:g}, from {request.sampling.guidance_start:g} of the steps on",
        "checkpoint, SHA-256": request.checkpoint_sha256,
        "autoencoder, SHA-256": request.autoencoder_sha256 or "none: it diffuses pixels",
        "engine": f"{request.engine} ({manifest.get('device')})",
        "versions": ", ".join(f"{name} {value}" for name, value in manifest.get("versions", {}).items()),
        "request": request.fingerprint,
        "dataset hash": dataset_hash(records),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in told.items())
    return f"""---
task_categories:
- image-classification
- unconditional-image-generation
tags:
- synthetic
- latent-diffusion
configs:
- config_name: default
  data_files:
  - split: train
    path: {PATTERNS[request.format]}
{info if request.format == "parquet" else ""}---

# Generated digits

![the first images](preview.png)

Images sampled from a latent diffusion model by `python -m ldm_ray.generate`. Each image follows from its seed, its
label and the settings below alone. Its label is what was asked of the model; no one has checked that it shows it.

| | |
| --- | --- |
{table}

`manifest.json` has all of this for programs. `sha256sum -c SHA256SUMS` checks the files;
`python -m ldm_ray.generate verify .` also makes images again and compares their bytes.
"""


def short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:180]}… ({len(text)} characters, see manifest.json)"


def write_npz(store: Store, request: Request, records: Mapping[int, Record]) -> None:
    """Streams ``images.npz`` out: arr_0 uint8 (N, H, W, 3) and arr_1 int64 (N,), as evaluators of ADM read it."""
    first = decode_png(next(dataset_rows(store, request, {0: records[0]})).png)
    labels = np.empty(request.count, dtype=np.int64)
    with store.replaced(NPZ) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(member("arr_0.npy"), "w", force_zip64=True) as array:
            array.write(header((request.count, *first.shape, 3), "|u1"))
            for i, row in enumerate(dataset_rows(store, request, records)):
                labels[i] = row.label
                array.write(np.repeat(decode_png(row.png)[:, :, None], 3, axis=2).tobytes())
        with archive.open(member("arr_1.npy"), "w", force_zip64=True) as array:
            array.write(header(labels.shape, "<i8") + labels.tobytes())


def member(name: str) -> zipfile.ZipInfo:
    """With the zip format's first date, so that the same images give the same bytes."""
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))


def header(shape: tuple[int, ...], kind: str) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": False, "shape": shape})
    return buffer.getvalue()
