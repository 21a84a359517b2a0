"""The checkpoints of a replica: which there are, which are loaded, and changing the served one."""

import asyncio
import contextlib
import ctypes
import dataclasses
import gc
import logging
import threading
from collections import OrderedDict
from functools import partial
from typing import Any

from ldm_ray.checkpoints import runs
from ldm_ray.checkpoints.choose import load
from ldm_ray.devices.device import pick_device
from ldm_ray.engine.generator import Generator
from ldm_ray.engine.jobs import Job, Outcome
from ldm_ray.engine.request import ImageRequest
from ldm_ray.engine.schema import MAX_IMAGES, MAX_SCALE, cut
from ldm_ray.engine.slots import Slots
from ldm_ray.engine.tiles import single_threaded
from ldm_ray.files.paths import AnyPath, to_path
from ldm_ray.service.errors import ApiError
from ldm_ray.service.settings import Settings, check_size
from ldm_ray.settings.errors import LdmError
from ldm_ray.settings.limits import MAX_GUIDANCE, MAX_STEPS
from ldm_ray.settings.sampling import SAMPLERS, SamplingConfig

WARM_IMAGES, WARM_S = 64, 60.0
log = logging.getLogger("ray.serve")


class Served:
    """One loaded checkpoint with its slots."""

    def __init__(self, name: str, path: AnyPath, settings: Settings) -> None:
        """Raises LdmError when it cannot be loaded."""
        self.name, self.path, self.stamp = name, path, stamp_of(path)
        search = [path.parent] + ([to_path(settings.outdir)] if settings.outdir else [])
        ae_ckpt = to_path(settings.ae_ckpt) if settings.ae_ckpt else None
        with single_threaded():  # weights are small: threads would wait for each other longer than they copy
            loaded = load(path, ae_ckpt, search=search)
            self.generator = Generator.of(loaded, pick_device(settings.device))
        check_size(path, self.generator.codec.image_size)
        self.only_digit: int | None = loaded.only_digit
        figures = {key: loaded.info.get(key) for key in ("epoch", "train_loss", "val_loss")}
        self.quality = {key: figure for key, figure in figures.items() if figure is not None}
        self.created = int(path.stat().st_mtime)
        self.fingerprint = self.generator.fingerprint
        self.slots = Slots(self.generator)

    def warm(self) -> None:
        """Makes images with and without guidance. Raises LdmError when they are unusable."""
        for scale in (1.0, 2.0):
            for count in (WARM_IMAGES, 1):
                done = threading.Event()
                label = self.only_digit or 0
                request = ImageRequest(range(count), [label] * count, SamplingConfig(guidance_scale=scale))
                job = self.slots.submit(request, on_done=partial(settled, done))
                if not done.wait(WARM_S):
                    raise LdmError(f"{self.path.name} made no images within {WARM_S:g} s")
                if any(outcome is not Outcome.DONE for outcome in job.outcomes):
                    raise LdmError(f"{self.path.name} makes images of numbers that are not finite")

    def close(self, drain_s: float) -> None:
        self.slots.close(drain_s)
        self.generator.tiles.pool.shutdown(wait=True)

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
                "num_inference_steps": min(MAX_STEPS, timesteps),
                "guidance_scale": MAX_GUIDANCE,
                "scale": MAX_SCALE,
                "work": settings.max_work,
                "samplers": list(SAMPLERS),
            },
            "defaults": {
                "sampler": default["sampler"],
                "guidance_scale": default["guidance_scale"],
                "num_inference_steps": {
                    name: len(self.generator.plan(SamplingConfig(sampler=name))) for name in SAMPLERS
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
        self._loading: dict[str, asyncio.Task[Served]] = {}
        self._lock = asyncio.Lock()  # one is loaded at a time; what is loaded waits for none

    async def known(self) -> dict[str, AnyPath]:
        """Every checkpoint that can be asked for, the default first."""
        paths = {self.default.name: self.default.path}
        paths |= {name: served.path for name, served in self.loaded.items() if name not in paths}
        if self.settings.outdir:
            try:
                for path in await asyncio.to_thread(runs.diffusion_checkpoints, to_path(self.settings.outdir)):
                    paths.setdefault(runs.name_of(path), path)
            except (LdmError, OSError) as error:  # deleted while it was looked at, or a store that does not answer
                log.error("the checkpoints cannot be listed: %s", error)
        return paths

    async def get(self, name: str | None) -> Served:
        """ApiError 404: unknown; 503: it does not load. What is loaded goes on when its file is deleted."""
        if name is None or name == self.default.name:
            return self.default
        served = self.loaded.get(name)
        path = served.path if served else (await self.known()).get(name)
        stamp = None if path is None else await asyncio.to_thread(stamp_or_none, path)
        if path is None or (stamp is None and name not in self.loaded):
            raise ApiError(
                404, f"there is no model {cut(name, 100)!r}; /v1/models lists them", "model", "model_not_found"
            )
        if served is None or self.loaded.get(name) is not served or stamp not in (None, served.stamp):
            served = await self._fresh(name, path)
        if name in self.loaded:
            self.loaded.move_to_end(name)
        return served

    async def _fresh(self, name: str, path: AnyPath) -> Served:
        """Loads a checkpoint once for all who wait for it, and goes on when they leave. ApiError 503."""
        task = self._loading.get(name)
        if task is None:
            task = self._loading[name] = asyncio.create_task(self._load_and_keep(path))
            task.add_done_callback(lambda done: self._loaded_or_not(name, done))
        try:
            return await asyncio.wait_for(asyncio.shield(task), self.settings.deadline_s)
        except asyncio.TimeoutError:
            message = f"model {cut(name, 100)!r} is still being loaded; try again"
            raise ApiError(503, message, "model", headers={"Retry-After": "5"}) from None
        except asyncio.CancelledError:
            raise
        except Exception:
            message = f"model {cut(name, 100)!r} does not load; the server's log has the reason"
            raise ApiError(503, message, "model") from None

    def _loaded_or_not(self, name: str, task: asyncio.Task[Served]) -> None:
        del self._loading[name]
        error = None if task.cancelled() else task.exception()
        if error is not None:
            expected = isinstance(error, LdmError | OSError)
            log.error("model %s does not load: %s", name, error, exc_info=None if expected else error)

    async def _load_and_keep(self, path: AnyPath) -> Served:
        async with self._lock:
            fresh = await asyncio.to_thread(self._load, path)
            self._keep(fresh)
            return fresh

    async def serve(self, ckpt: str) -> None:
        """Makes another checkpoint the default, once it is loaded and warm. LdmError: it stays as it was."""
        async with self._lock:
            fresh = await asyncio.to_thread(self._load, to_path(ckpt).absolute())
            self.default = fresh
            self._keep(fresh)

    def _keep(self, fresh: Served) -> None:
        gone = [self.loaded.pop(fresh.name)] if fresh.name in self.loaded else []
        self.loaded[fresh.name] = fresh
        for name in list(self.loaded):
            if len(self.loaded) > self.settings.models and name not in (self.default.name, fresh.name):
                gone.append(self.loaded.pop(name))
        while gone:  # what it has taken is finished, while others are served
            threading.Thread(target=close_for_good, args=([gone.pop()], self.settings.deadline_s), daemon=True).start()

    def close(self) -> None:
        for served in self.loaded.values():
            served.close(self.settings.drain_s)

    def _load(self, path: AnyPath) -> Served:
        served = Served(runs.name_of(path), path, self.settings)
        try:
            served.warm()
        except BaseException:
            served.close(0)
            raise
        return served


def close_for_good(last: list[Served], drain_s: float) -> None:
    """Closes the last reference to a model, and gives its memory back to the system: glibc would keep it."""
    last.pop().close(drain_s)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def stamp_or_none(path: AnyPath) -> tuple[int, int] | None:
    """None where there is no file, or no answer."""
    try:
        return stamp_of(path)
    except (LdmError, OSError):
        return None


def stamp_of(path: AnyPath) -> tuple[int, int]:
    """Changes when a file is replaced."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size
