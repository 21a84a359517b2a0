"""Makes a dataset of images with a trained checkpoint, on Ray: Parquet shards that follow from the request alone.

python -m ldm_ray.generate --seeds 0-999999 --outdir digits      the newest checkpoint; run again to go on
python -m ldm_ray.generate --ckpt latest.pt --seeds 0-9999 --labels 7 --outdir s3://bucket/sevens
python -m ldm_ray.generate --ckpt latest.pt --dry-run            what would be made, how large, how long
python -m ldm_ray.generate verify digits --sample 1000           checks hashes, makes images again
python -m ldm_ray.generate --requests in.jsonl --output out.jsonl
"""

from __future__ import annotations

if not __package__:  # python ldm_ray/generate.py
    __import__("as_file")

import contextlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_ray.files.hold import hold
from ldm_ray.files.paths import local_path, outdir, to_path
from ldm_ray.settings.datasets import GenerateConfig, VerifyConfig
from ldm_ray.settings.errors import ConfigError
from ldm_ray.terminal import cli, flags
from ldm_ray.terminal.progress import Progress
from ldm_ray.terminal.signals import on_first
from ldm_ray.terminal.words import counted

if TYPE_CHECKING:
    from ldm_ray.checkpoints.checkpoint import DiffusionCheckpoint
    from ldm_ray.dataset.request import Request
    from ldm_ray.dataset.shards import Record
    from ldm_ray.files.store import Store

PROG = "python -m ldm_ray.generate"
log = logging.getLogger(__name__)


class Stopped(BaseException):
    """A signal asked to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def stopped(number: int) -> None:
    raise Stopped(number)


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["verify"]:
        return verify(given[1:])
    config = flags.parse_config(GenerateConfig, flags.Parser(prog=PROG, description=__doc__), given)
    if config.output and not config.requests:
        raise ConfigError("--output belongs to --requests FILE; a dataset's folder is --outdir")
    from ldm_ray.checkpoints.choose import chosen

    model = chosen(config, outdir(None))
    if config.requests:
        from ldm_ray.checkpoints import runs
        from ldm_ray.dataset.answers import answer_file

        output = local_path(config.output or f"{config.requests}.answers.jsonl")
        name = runs.name_of(to_path(model.path))
        return answer_file(local_path(config.requests), output, name, model, config)
    with contextlib.ExitStack() as held:
        return generate(config, model, held)


def verify(argv: Sequence[str]) -> int:
    """``verify DIR``: 0 when all is as it was written, 1 when something is not."""
    parser = flags.Parser(prog=f"{PROG} verify", description="Checks hashes and makes images again.")
    parser.add_argument("folder", metavar="DIR", help="a dataset that generate has made")
    flags.add_flags(parser, VerifyConfig)
    given = vars(parser.parse_args(argv))
    folder = given.pop("folder")
    config = VerifyConfig(**given)
    from ldm_ray.dataset.verify import verify_dataset

    return verify_dataset(folder, config)


def request_of(config: GenerateConfig, model: DiffusionCheckpoint, engine: str) -> Request:
    """What the flags ask for. ConfigError on what cannot be made."""
    from ldm_ray.dataset.request import Request
    from ldm_ray.dataset.rows import Labels, Seeds
    from ldm_ray.diffusion.samplers import plan_of, with_defaults
    from ldm_ray.engine.generator import check_precision

    plan_of(model.schedule, config.sampling, model.prediction_type)  # more steps than timesteps are refused here
    check_precision(config.precision, model.codec)
    assert model.codec is not None
    seeds = Seeds.parse(config.seeds)
    return Request(
        seeds=seeds,
        labels=Labels.parse(
            config.labels, model.denoiser.num_classes, len(seeds), model.only_digit, model.class_names, model.labels
        ),
        sampling=with_defaults(model.schedule, config),
        shard_size=config.shard_size,
        format=config.format,
        latent_dim=model.codec.latent_dim,
        save_latents=config.save_latents,
        checkpoint_sha256=model.sha256,
        autoencoder_sha256=model.autoencoder_sha256,
        engine=engine,
    )


def generate(config: GenerateConfig, model: DiffusionCheckpoint, held: contextlib.ExitStack) -> int:
    """Makes what is missing of the dataset; starts no Ray where nothing is. held: has the folder while it is written.

    ConfigError when another command has it, or it holds another request.
    """
    from ldm_ray.dataset import finish, shards
    from ldm_ray.devices.device import pick_device
    from ldm_ray.engine.generator import fingerprint_of
    from ldm_ray.files.store import Store

    store = Store(config.outdir)
    with contextlib.ExitStack() as stack:
        if os.environ.get("RAY_ADDRESS") and not config.dry_run:
            device, engine = join(stack, config)
        else:
            local = pick_device(config.device)
            device, engine = local.type, fingerprint_of(local, config.precision)
        asked = request_of(config, model, engine)
        found, records = made_before(config, store, asked)
        if config.dry_run:
            from ldm_ray.dataset.estimate import estimate

            with Progress("measuring how fast images are made"):
                told = estimate(config, model, asked, store, records, device)
            print(told)
            return 0
        writes = config.npz or not finish.is_finished(store, asked, records)
        if writes:  # a finished folder may be read-only
            held.enter_context(hold(Path(store.root) if store.is_local else to_path(config.outdir)))
            found, records = made_before(config, store, asked)  # another command may have had it until now
        ae_ckpt = str(to_path(config.ae_ckpt).absolute()) if config.ae_ckpt else None
        manifest = found or asked.manifest(str(to_path(model.path).absolute()), ae_ckpt, device)
        if len(records) < asked.num_shards:
            log.info(
                "%s, %s of %s shards there, to %s",
                counted(asked.count, "image"), f"{len(records):,}", f"{asked.num_shards:,}", store
            )  # fmt: skip
            if not os.environ.get("RAY_ADDRESS"):
                join(stack, config)
            number = make(config, store, shards.Job(model, asked, store, config.batch_size), records, device, manifest)
            if number:
                stack.close()
                store.clean()
                there = sum(record.rows for record in records.values())
                print(f"stopped with {there:,} of {asked.count:,} images; run the same command again to go on")
                return 128 + number
    with Progress("finishing the dataset"):
        finish.finish(store, asked, records, manifest)
        if config.npz:
            finish.write_npz(store, asked, records)
    if writes:
        store.clean()
    size = sum(record.bytes for record in records.values())
    what = f"{counted(asked.count, 'image')} in {counted(asked.num_shards, 'shard')}"
    large = f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"
    print(f"dataset      {store}: {what}, {large}")
    print(f"hash         {finish.dataset_hash(records)}")
    if config.npz:
        print(f"for metrics  {store}/{finish.NPZ}")
    print(f"check        {cli.runnable(PROG)} verify {shlex.quote(str(store))}")
    return 0


def made_before(
    config: GenerateConfig, store: Store, asked: Request
) -> tuple[dict[str, Any] | None, dict[int, Record]]:
    """(manifest of the folder, if it has one; records of its shards). ConfigError when they are not what is asked."""
    from ldm_ray.dataset import request, shards

    manifest = request.check(store, asked, config.resume)
    return manifest, shards.committed(store, asked) if manifest else {}


def join(stack: contextlib.ExitStack, config: GenerateConfig) -> tuple[str, str]:
    """Starts or joins Ray until the stack closes; (device, fingerprint) of its workers."""
    from ldm_ray.distributed.cluster import connected
    from ldm_ray.distributed.generate import where
    from ldm_ray.distributed.gpus import share_of

    stack.enter_context(connected())
    return where(config.device, config.precision, share_of(config))


def make(
    config: GenerateConfig, store: Store, job: Any, records: dict[int, Record], device: str, manifest: dict[str, Any]
) -> int:
    """Makes the missing shards and adds their records; the signal's number when one asked to stop, else 0."""
    from ldm_ray.dataset.request import MANIFEST, write_manifest
    from ldm_ray.distributed import generate as ray_generate
    from ldm_ray.distributed.cluster import check_shared
    from ldm_ray.distributed.gpus import share_of

    if store.is_local:
        folder = Path(store.root)
        folder.mkdir(parents=True, exist_ok=True)
        check_shared(folder)
    store.clean()
    if MANIFEST not in store.sizes():
        write_manifest(store, manifest)
    missing = [number for number in range(job.request.num_shards) if number not in records]
    share = share_of(config)
    workers = ray_generate.pool_size(config.num_workers, len(missing), device, share)
    progress = Made(job.request.count, sum(record.rows for record in records.values()))
    try:
        with on_first(stopped), contextlib.closing(ray_generate.generate(job, missing, workers, device, share)) as made:
            for record, _, seconds in made:
                records[record.shard] = record
                progress.add(record.rows, seconds)
    except Stopped as stop:
        return stop.number
    finally:
        progress.close()
    lost = [number for number in missing if number not in records]
    if lost:
        raise ConfigError(f"{len(lost)} of {len(missing)} shards did not come back: run the same command again")
    progress.tell(workers)
    return 0


class Made:
    """Images so far, images per second and time left: a bar on a terminal, else a line now and then."""

    def __init__(self, total: int, there: int, every: float = 10.0) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.total, self.there, self.made, self.every = total, there, 0, every
        self.called = time.perf_counter()
        self.began: float | None = None
        self.told = self.called
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn()
        self.bar = Bar(*columns, transient=True, disable=not sys.stderr.isatty())
        self.task = self.bar.add_task("", total=total, completed=there, rate="")
        self.bar.start()

    def rate(self) -> float:
        """Images per second since the first shard was begun."""
        return self.made / max(1e-9, time.perf_counter() - (self.began or self.called))

    def add(self, images: int, seconds: float) -> None:
        """A shard of so many images that took so long."""
        now = time.perf_counter()
        self.began = self.began or now - seconds
        self.made += images
        done = self.there + self.made
        self.bar.update(self.task, completed=done, rate=f"{self.rate():,.0f} images/s")
        if self.bar.disable and now - self.told >= self.every and done < self.total:
            self.told = now
            left = (self.total - done) / self.rate()
            log.info(
                "%s/%s images, %s/s, %s s left", f"{done:,}", f"{self.total:,}", f"{self.rate():,.0f}", f"{left:,.0f}"
            )

    def close(self) -> None:
        self.bar.stop()

    def tell(self, workers: int) -> None:
        log.info(
            "%s made in %.1f s by %s: %s images/s once they were up",
            counted(self.made, "image"),
            time.perf_counter() - self.called,
            counted(workers, "worker"),
            f"{self.rate():,.0f}",
        )


if __name__ == "__main__":
    cli.run(main, PROG)
