"""Shards as bytes: Parquet, a tar of WebDataset, or PNG files with a list of them.

N images of a shard, D latent. Each format is a function of the rows alone: no time, no user, no library's default.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ldm_ray.data.examples import fixed_size
from ldm_ray.data.images import encode_pngs
from ldm_ray.files.store import Store
from ldm_ray.settings.errors import DataError

GROUP = 1000  # rows of a row group
ENDINGS = {"parquet": ".parquet", "webdataset": ".tar", "png": "/metadata.jsonl"}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True)
class Shard:
    """first: position of its first image. images (N, H, W) uint8, seeds and labels (N,) int64, latents (N, D)
    float32 where they are to be kept."""

    first: int
    images: np.ndarray
    seeds: np.ndarray
    labels: np.ndarray
    latents: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Row:
    """One image as it is in a dataset."""

    position: int
    png: bytes
    seed: int
    label: int
    latent: list[float] | None = None


def features(num_classes: int, latent_dim: int | None) -> dict[str, Any]:
    """The columns as the ``datasets`` library describes them."""
    described: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": [str(label) for label in range(num_classes)], "_type": "ClassLabel"},
        "seed": {"dtype": "int64", "_type": "Value"},
    }
    if latent_dim:
        value = {"dtype": "float32", "_type": "Value"}
        described["latent"] = {"feature": value, "length": latent_dim, "_type": "List"}
    return described


def parquet(shard: Shard, num_classes: int) -> bytes:
    """Rows ``image``, ``label``, ``seed`` and, where kept, ``latent``, in groups of 1,000, compressed with zstd."""
    columns = [("image", IMAGE), ("label", pa.int64()), ("seed", pa.int64())]
    dim = None if shard.latents is None else shard.latents.shape[1]
    if dim:
        columns.append(("latent", pa.list_(pa.float32(), dim)))
    metadata = {"huggingface": json.dumps({"info": {"features": features(num_classes, dim)}})}
    schema, buffer = pa.schema(columns, metadata=metadata), io.BytesIO()
    with pq.ParquetWriter(
        buffer,
        schema,
        version="2.6",
        compression="zstd",
        compression_level=3,
        use_dictionary=["label"],
        write_statistics=["label", "seed"],
        data_page_version="1.0",
        data_page_size=1 << 20,
    ) as writer:
        for start in range(0, len(shard), GROUP):
            rows = slice(start, start + GROUP)
            pngs = pa.array(encode_pngs(shard.images[rows]), pa.binary())
            image = pa.StructArray.from_arrays([pngs, pa.nulls(len(pngs), pa.string())], fields=list(IMAGE))
            arrays: list[pa.Array] = [image, pa.array(shard.labels[rows]), pa.array(shard.seeds[rows])]
            if shard.latents is not None:
                arrays.append(fixed_size(shard.latents[rows]).cast(schema.field("latent").type))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=GROUP)
    return buffer.getvalue()


def tar(shard: Shard) -> bytes:
    """WebDataset: ``0000000042.png``, ``.cls``, ``.json`` (seed, label) and, where kept, ``.npy`` of each position."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for i, png in enumerate(encode_pngs(shard.images)):
            seed, label = int(shard.seeds[i]), int(shard.labels[i])
            members = {
                "png": png,
                "cls": str(label).encode(),
                "json": json.dumps({"seed": seed, "label": label}).encode(),
            }
            if shard.latents is not None:
                array = io.BytesIO()
                np.save(array, shard.latents[i])
                members["npy"] = array.getvalue()
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{shard.first + i:010d}.{ending}")
                info.size, info.mode = len(data), 0o644
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pngs(shard: Shard, store: Store, folder: str) -> bytes:
    """Writes each image as a file and returns the list of them, which holds their SHA-256: a folder counts only
    once that list is written."""
    lines = []
    for i, png in enumerate(encode_pngs(shard.images)):
        name = f"{shard.first + i:010d}.png"
        store.write(f"{folder}/{name}", png, durable=False)
        line: dict[str, Any] = {"file_name": name, "label": int(shard.labels[i]), "seed": int(shard.seeds[i])}
        line["sha256"] = hashlib.sha256(png).hexdigest()
        if shard.latents is not None:
            line["latent"] = shard.latents[i].tolist()
        lines.append(json.dumps(line))
    return ("\n".join(lines) + "\n").encode()


def encode(shard: Shard, format: str, num_classes: int, store: Store, stem: str) -> bytes:
    """The shard's file in this format."""
    if format == "parquet":
        return parquet(shard, num_classes)
    return tar(shard) if format == "webdataset" else pngs(shard, store, f"data/{stem}")


def rows(data: bytes, format: str, store: Store, stem: str, first: int) -> Iterator[Row]:
    """The rows in a shard's file, in order. DataError when it is not of this format, OSError on a lost PNG."""
    try:
        if format == "parquet":
            position = first
            for batch in pq.ParquetFile(io.BytesIO(data)).iter_batches(GROUP):
                for row in batch.to_pylist():
                    yield Row(position, row["image"]["bytes"], row["seed"], row["label"], row.get("latent"))
                    position += 1
        elif format == "png":
            for line in map(json.loads, data.decode().splitlines()):
                png = store.read(f"data/{stem}/{line['file_name']}")
                if hashlib.sha256(png).hexdigest() != line["sha256"]:
                    raise DataError(f"data/{stem}/{line['file_name']} is not the file that was written")
                yield Row(int(line["file_name"][:-4]), png, line["seed"], line["label"], line.get("latent"))
        else:
            yield from tar_rows(data)
    except (pa.ArrowException, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"data/{stem}{ENDINGS[format]} is damaged: {' '.join(str(error).split())[:200]}") from None


def tar_rows(data: bytes) -> Iterator[Row]:
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        position = -1
        for info in archive:
            number, _, ending = info.name.partition(".")
            if int(number) != position and found:
                yield tar_row(position, found)
                found = {}
            position = int(number)
            member = archive.extractfile(info)
            assert member is not None
            found[ending] = member.read()
        if found:
            yield tar_row(position, found)


def tar_row(position: int, found: dict[str, bytes]) -> Row:
    told = json.loads(found["json"])
    latent = np.load(io.BytesIO(found["npy"])).tolist() if "npy" in found else None
    return Row(position, found["png"], told["seed"], told["label"], latent)
