"""Images to examples with Ray Data: an actor pool decodes the PNGs and runs the frozen encoder."""

from __future__ import annotations

import logging
import time

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayError

from ldm_ray.checkpoints.checkpoint import AutoencoderCheckpoint
from ldm_ray.checkpoints.runs import examples_dir
from ldm_ray.data.examples import fixed_size, is_complete, write_examples
from ldm_ray.data.identity import identity_of
from ldm_ray.data.images import decode_png, to_float
from ldm_ray.data.sources import ImageSource, place
from ldm_ray.data.statistics import LatentStatistics
from ldm_ray.devices.device import sent, settle
from ldm_ray.distributed.cluster import check_shared
from ldm_ray.distributed.gpus import CPU, Share, check_gpus, check_worker
from ldm_ray.files.paths import AnyPath
from ldm_ray.files.records import fingerprint
from ldm_ray.models.codec import LatentCodec
from ldm_ray.settings.errors import DataError, LdmError
from ldm_ray.terminal.progress import Progress

log = logging.getLogger(__name__)
# Of the identity of latents that a GPU made. A CPU's have neither, nor had any before GPUs had names of their own.
ON_GPU = {"device": "cuda", "precision": "fp32"}
BLOCK_ROWS = 2048  # one block is one batch: what shares a batch never depends on the number of workers


class Encoder:
    """An actor: rows with encoded images in, rows with raw latents (or pixels) out."""

    def __init__(self, shared: list[ray.ObjectRef], size: tuple[int, int], gpu: bool) -> None:
        check_worker()
        torch.set_num_threads(1)
        codec: LatentCodec | None = ray.get(shared[0])
        self.device = settle("cuda" if gpu else "cpu")
        self.codec = codec.to(self.device) if codec else None
        self.size = size

    def __call__(self, batch: pa.Table) -> pa.Table:
        data = batch["image"].to_pylist()
        index = batch["index"].to_pylist()
        images = np.stack(
            [decode_png(row["bytes"], self.size, place(row, number)) for row, number in zip(data, index, strict=True)]
        )
        if self.codec is None:
            name, vectors = "pixels", images.reshape(len(images), -1)
        else:
            pixels = to_float(sent(torch.from_numpy(images)[:, None], self.device))
            name, vectors = "latent", self.codec.encode(pixels).cpu().numpy()
        return pa.table({name: fixed_size(vectors), "label": batch["label"], "index": batch["index"]})


def encode(
    source: ImageSource,
    autoencoder: AutoencoderCheckpoint | None,
    outdir: AnyPath,
    workers: int | None = None,
    share: Share = CPU,
) -> AnyPath:
    """The folder with the examples of a source: latents, or pixels without an autoencoder.

    share: of the GPUs, for each worker. What is there already is reused. Raises DataError on an
    image that cannot be used.
    """
    share = share if autoencoder else CPU
    identity = identity_of(source, autoencoder.sha256 if autoencoder else None) | (ON_GPU if share else {})
    folder = examples_dir(outdir, fingerprint(identity))
    what = "latents" if autoencoder else "pixels"
    if is_complete(folder):
        log.info("%s of %s images: reused from %s", what, f"{len(source):,}", folder)
        return folder
    outdir.mkdir(parents=True, exist_ok=True)
    check_shared(outdir)
    check_gpus(share)
    count = min(workers or share.room(), max(1, -(-len(source) // BLOCK_ROWS)))
    started = time.perf_counter()
    table = run(source, autoencoder, count, share, what)
    write_examples(folder, table, "latent" if autoencoder else "pixels", identity)
    seconds = time.perf_counter() - started
    log.info("%s of %s images written to %s in %.1f s", what, f"{len(source):,}", folder, seconds)
    return folder


def run(
    source: ImageSource, autoencoder: AutoencoderCheckpoint | None, count: int, share: Share, what: str
) -> pa.Table:
    """The Ray Data job of up to so many workers; the result comes back in the order of the
    images, whatever the workers' order was."""
    codec = None
    if autoencoder:
        codec = autoencoder.codec.with_statistics(LatentStatistics.identity(autoencoder.codec.latent_dim)).cpu()
    blocks = [source.table.slice(start, BLOCK_ROWS) for start in range(0, len(source), BLOCK_ROWS)]
    rows = ray.data.from_arrow(blocks).map_batches(
        Encoder,
        fn_constructor_args=([ray.put(codec)], source.image_size, bool(share)),
        batch_size=BLOCK_ROWS,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(min_size=min(count, share.room()), max_size=count),
        **share.options(),
    )
    parts: list[pa.Table] = []
    try:
        with Progress(f"encoding {what}", len(source)) as progress:
            for part in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
                assert isinstance(part, pa.Table)
                parts.append(part)
                progress.advance(part.num_rows)
    except RayError as error:
        raise cause_of(error) from None
    table = pa.concat_tables(parts).sort_by("index").combine_chunks()
    if table.num_rows != len(source):
        raise DataError(f"encoding returned {table.num_rows} rows of {len(source)}: run it again")
    return table


def cause_of(error: BaseException) -> BaseException:
    """The user's mistake inside a Ray error, or the error itself."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, LdmError):
            return type(seen)(str(seen).splitlines()[0]) if isinstance(error, RayError) else seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    text = str(error)
    for kind in LdmError.__subclasses__():
        marker = f"{kind.__module__}.{kind.__name__}: "
        if marker in text:
            return kind(text.rpartition(marker)[2].splitlines()[0])
    return error
