"""The checkpoints of a replica: which there are, which are loaded, and changing the served one."""

import asyncio
import dataclasses
import logging
import threading
from collections import OrderedDict
from functools import partial
from typing import Any

from ldm_ray import checkpoint, runs
from ldm_ray.config import SAMPLERS, SamplingConfig
from ldm_ray.devices import pick_device
from ldm_ray.diffusion.samplers import DEFAULT_STEPS
from ldm_ray.errors import LdmError
from ldm_ray.generator import Generator
from ldm_ray.paths import AnyPath, to_path
from ldm_ray.slot_jobs import Job, Outcome
from ldm_ray.slots import Slots
from serve.errors import ApiError
from serve.schemas import MAX_IMAGES, MAX_SCALE
from serve.settings import Settings, check_size

WARM_IMAGES = 64
WARM_S = 300
log = logging.getLogger("ray.serve")


class Served:
    """One loaded checkpoint with its slots."""

    def __init__(self, name: str, path: AnyPath, settings: Settings) -> None:
        """Raises LdmError when it cannot be loaded."""
        self.name, self.path, self.stamp = name, path, stamp_of(path)
        search = [path.parent] + ([to_path(settings.outdir)] if settings.outdir else [])
        ae_ckpt = to_path(settings.ae_ckpt) if settings.ae_ckpt else None
        self.generator, args = Generator.open(path, pick_device(settings.device), ae_ckpt, search=search)
        check_size(path, self.generator.codec.image_size)
        self.only_digit: int | None = args.get("only_digit")
        told = checkpoint.summary(checkpoint.glance(path)[0])
        self.quality = {key: told[key] for key in ("epoch", "train_loss", "val_loss") if key in told}
        self.created = int(path.stat().st_mtime)
        self.fingerprint = self.generator.fingerprint
        self.slots = Slots(self.generator)

    def warm(self) -> None:
        """Makes images with and without guidance. Raises LdmError when they are unusable."""
        for scale in (1.0, 2.0):
            for count in (WARM_IMAGES, 1):
                done = threading.Event()
                label = self.only_digit or 0
                job = Job(
                    seeds=range(count),
                    labels=[label] * count,
                    sampling=SamplingConfig(guidance_scale=scale),
                    on_done=partial(settled, done),
                )
                self.slots.submit(job)
                if not done.wait(WARM_S):
                    raise LdmError(f"{self.path.name} has not made its first images within {WARM_S} s")
                if any(outcome is not Outcome.DONE for outcome in job.outcomes):
                    raise LdmError(f"{self.path.name} makes images of numbers that are not finite")

    def close(self, drain_s: float) -> None:
        self.slots.close(drain_s)
        self.generator.tiles.pool.shutdown(wait=False)

    def describe(self, settings: Settings) -> dict[str, Any]:
        """As /v1/models tells of it."""
        codec, timesteps = self.generator.codec, self.generator.schedule.num_train_timesteps
        default = dataclasses.asdict(SamplingConfig())
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "ldm_ray",
            "loaded": True,
            "space": "pixel" if codec.kind == "pixels" else "latent",
            "autoencoder": None if codec.kind == "pixels" else codec.kind,
            "latent_size": codec.latent_dim,
            "image_size": list(codec.image_size),
            "classes": self.generator.num_classes,
            "class_names": list(self.generator.class_names),
            "only_digit": self.only_digit,
            "prediction_type": self.generator.prediction_type,
            "limits": {
                "n": MAX_IMAGES,
                "num_inference_steps": min(1000, timesteps),
                "guidance_scale": 20,
                "scale": MAX_SCALE,
                "work": settings.max_work,
                "samplers": list(SAMPLERS),
            },
            "defaults": {
                "sampler": default["sampler"],
                "guidance_scale": default["guidance_scale"],
                "num_inference_steps": {
                    name: len(self.slots.plan(SamplingConfig(sampler=name))) for name in DEFAULT_STEPS
                },
            },
            "sha256": self.generator.sha256,
            "fingerprint": self.fingerprint,
            "device": self.generator.device.type,
            "quality": self.quality,
        }


def settled(done: threading.Event, _: Job) -> None:
    done.set()


class Library:
    """Loads on demand, keeps so many, never lets the default go."""

    def __init__(self, settings: Settings) -> None:
        assert settings.ckpt is not None
        self.settings = settings
        self.default = self._load(to_path(settings.ckpt))
        self.loaded: OrderedDict[str, Served] = OrderedDict({self.default.name: self.default})
        self._lock = asyncio.Lock()

    async def known(self) -> dict[str, AnyPath]:
        """Every checkpoint that can be asked for, the default first."""
        found = {self.default.name: self.default.path}
        found |= {name: served.path for name, served in self.loaded.items() if name not in found}
        if self.settings.outdir:
            for path in await asyncio.to_thread(runs.diffusion_checkpoints, to_path(self.settings.outdir)):
                found.setdefault(name_of(path), path)
        return found

    async def get(self, name: str | None) -> Served:
        """ApiError 404: unknown; 503: it does not load."""
        if name is None or name == self.default.name:
            return self.default
        path = (await self.known()).get(name)
        if path is None:
            raise ApiError(404, f"there is no model {name[:200]!r}; /v1/models lists them", "model", "model_not_found")
        async with self._lock:
            found = self.loaded.get(name)
            if found is None or found.stamp != await asyncio.to_thread(stamp_of, path):
                try:
                    fresh = await asyncio.to_thread(self._load, path)
                except (LdmError, OSError) as error:
                    log.error("model %s does not load: %s", name, error)
                    raise ApiError(
                        503, f"model {name} does not load; the server's log has the reason", "model"
                    ) from None
                await self._keep(fresh)
                found = fresh
            self.loaded.move_to_end(name)
            return found

    async def serve(self, ckpt: str) -> None:
        """Makes another checkpoint the default, once it is loaded and warm. LdmError: it stays as it was."""
        async with self._lock:
            fresh = await asyncio.to_thread(self._load, to_path(ckpt).absolute())
            self.default = fresh
            await self._keep(fresh)

    async def _keep(self, fresh: Served) -> None:
        gone = [self.loaded.pop(fresh.name)] if fresh.name in self.loaded else []
        self.loaded[fresh.name] = fresh
        for name in list(self.loaded):
            if len(self.loaded) > self.settings.models and name not in (self.default.name, fresh.name):
                gone.append(self.loaded.pop(name))
        for old in gone:  # what it has taken is finished, while others are served
            threading.Thread(target=old.close, args=(self.settings.deadline_s,), daemon=True).start()

    def close(self) -> None:
        for served in self.loaded.values():
            served.close(self.settings.drain_s)

    def _load(self, path: AnyPath) -> Served:
        served = Served(name_of(path), path, self.settings)
        try:
            served.warm()
        except BaseException:
            served.close(0)
            raise
        return served


def name_of(path: AnyPath) -> str:
    """The run's name for its ``latest.pt``, run and file for its other checkpoints, else the file's name."""
    if path.name == "latest.pt":
        return path.parent.name
    return f"{path.parent.name}-{path.stem}" if path.stem.startswith("checkpoint_epoch_") else path.stem


def stamp_of(path: AnyPath) -> tuple[int, int]:
    """Changes when a file is replaced."""
    told = path.stat()
    return told.st_mtime_ns, told.st_size
