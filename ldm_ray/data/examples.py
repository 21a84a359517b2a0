"""What a network trains on, in Parquet: latents, or pixels for the autoencoders.

``latent: fixed_size_list<float>[D]`` (raw, as the autoencoder makes them) or ``pixels:
fixed_size_list<uint8>[H·W]``; ``label`` int64; ``index`` int64, the image's position in its split, ascending.
The schema metadata ``ldm_ray`` is JSON: fingerprint, what it was made of, count, and for latents their mean
and covariance. ``manifest.json`` is written last: a directory without it is never read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ldm_ray.data.statistics import LatentStatistics
from ldm_ray.files.paths import AnyPath, folder_at_once, write_bytes
from ldm_ray.files.records import fingerprint
from ldm_ray.settings.errors import DataError

MANIFEST = "manifest.json"
ROWS_PER_FILE = 1_000_000
SPLIT_SEED = 20  # the held-out rows are the same for every run over the same examples


@dataclass(frozen=True)
class Examples:
    """vectors (N, D) float32 or (N, H·W) uint8, labels (N,) int64, index (N,) int64, and the manifest."""

    vectors: Tensor
    labels: Tensor
    index: Tensor
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def statistics(self) -> LatentStatistics:
        """Of the raw latents."""
        return LatentStatistics(torch.tensor(self.manifest["mean"]), torch.tensor(self.manifest["covariance"]))

    def take(self, rows: Tensor) -> Examples:
        return Examples(self.vectors[rows], self.labels[rows], self.index[rows], self.manifest)


def is_complete(folder: AnyPath) -> bool:
    """True when the job that wrote the folder finished."""
    return (folder / MANIFEST).is_file()


def write_examples(folder: AnyPath, table: pa.Table, column: str, identity: dict[str, Any]) -> None:
    """Writes the table (``column``, label, index; sorted by index) and, last, the manifest.

    A folder that is complete already stays as it is: others may be reading it.
    """
    manifest: dict[str, Any] = {"fingerprint": fingerprint(identity), "identity": identity, "count": table.num_rows}
    if column == "latent":
        statistics = LatentStatistics.of(torch.from_numpy(_vectors(table, column)))
        manifest |= {"mean": statistics.mean.tolist(), "covariance": statistics.covariance.tolist()}
    table = table.replace_schema_metadata({"ldm_ray": json.dumps(manifest)})
    with folder_at_once(folder, MANIFEST) as new:
        for number, start in enumerate(range(0, table.num_rows, ROWS_PER_FILE)):
            part = table.slice(start, ROWS_PER_FILE)
            sink = pa.BufferOutputStream()
            pq.write_table(part, sink, compression="zstd")
            write_bytes(new / f"part-{number:05d}.parquet", sink.getvalue())
        write_bytes(new / MANIFEST, json.dumps(manifest | {"column": column}, indent=1).encode())


def read_examples(folder: AnyPath) -> Examples:
    """Reads a complete folder. DataError when it is not complete or its rows are not those of the manifest."""
    if not is_complete(folder):
        raise DataError(f"{folder} has no {MANIFEST}: the job that writes it did not finish; run it again")
    manifest = json.loads((folder / MANIFEST).read_text())
    column = manifest["column"]
    files: list[AnyPath] = sorted(folder.glob("part-*.parquet"), key=str)
    parts = [pq.read_table(pa.BufferReader(file.read_bytes())) for file in files]
    if sum(part.num_rows for part in parts) != manifest["count"]:
        raise DataError(f"{folder} does not hold the {manifest['count']} rows of its manifest; delete it and run again")
    table = pa.concat_tables(parts).combine_chunks()
    return Examples(
        torch.from_numpy(_vectors(table, column)),
        torch.from_numpy(table["label"].to_numpy().copy()),
        torch.from_numpy(table["index"].to_numpy().copy()),
        manifest,
    )


def split(examples: Examples, val_fraction: float) -> tuple[Tensor, Tensor]:
    """(training rows, held-out rows), both ascending; at least one row each. DataError with fewer than 2 rows."""
    count = len(examples)
    if count < 2:
        raise DataError(f"{count} image is too few: at least 2 are needed, one to train on and one to hold out")
    held = min(count - 1, max(1, round(count * val_fraction)))
    order = np.random.Generator(np.random.Philox(key=SPLIT_SEED)).permutation(count)
    return torch.from_numpy(np.sort(order[held:])), torch.from_numpy(np.sort(order[:held]))


def fixed_size(vectors: np.ndarray) -> pa.Array:
    """(N, D) as an Arrow fixed_size_list."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), vectors.shape[1])


def _vectors(table: pa.Table, column: str) -> np.ndarray:
    array = table[column].combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    flat = array.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, array.type.list_size).copy()
