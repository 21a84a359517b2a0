"""The Ray Serve application.

serve run serve.app:deployment                     the newest checkpoint under the output directory
serve run serve.app:deployment ckpt=latest.pt device=cpu token=secret replicas=1-4
"""

# No ``from __future__ import annotations`` here: Serve reads the type of the builder's argument.
import asyncio
import gc
import logging
import os
import sys
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from ldm_ray.distributed.gpus import Share, check_worker, shared_out
from ldm_ray.service.proxy import CALLBACK
from ldm_ray.service.routes import build
from ldm_ray.service.service import Service
from ldm_ray.service.settings import Mistake, Settings, check
from ldm_ray.settings.errors import ConfigError

SWITCH_S = 0.0005  # the threads of tiles and the event loop hand over to each other ten times as often as by default
MAX_ONGOING = 65_536  # admission is the service's own, in JSON; Serve's limit is only above it and half-sent bodies
log = logging.getLogger("ray.serve")


@serve.deployment(name="images")
@serve.ingress()
class Images:
    """One replica: the HTTP routes and the models behind them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        check_worker()
        sys.setswitchinterval(SWITCH_S)
        gc.collect()
        gc.freeze()  # a body of many small lists would have all modules searched for garbage, again and again
        given = Settings(**settings)
        torch.set_num_threads(given.threads or len(os.sched_getaffinity(0)))  # Ray leaves one for an actor
        self.service = Service(given)

    def __serve_build_asgi_app__(self) -> Any:
        return build(self.service)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """``user_config: {ckpt: PATH}`` changes the served checkpoint. One that does not load changes nothing."""
        ckpt = str(user_config.get("ckpt") or "")
        if not ckpt or ckpt == str(self.service.library.default.path):
            return
        try:
            await self.service.library.serve(ckpt)
            self.service.metrics.reloads.labels("done").inc()
        except Exception as error:
            log.error("the checkpoint of user_config does not load, the old one goes on: %s", error)
            self.service.metrics.reloads.labels("failed").inc()

    def check_health(self) -> None:
        if not self.service.library.default.slots.alive:
            raise RuntimeError("the thread of the slots ended")

    async def __del__(self) -> None:
        if hasattr(self, "service"):
            await asyncio.to_thread(self.service.close)


def deployment(args: Settings) -> Application:
    """``serve run serve.app:deployment name=value …``; see ``settings.py`` for the names."""
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):  # Ray is about to start here
        os.environ.setdefault(*CALLBACK)
    settings = args.resolved()
    assert settings.ckpt is not None and settings.outdir is not None
    check(settings.ckpt, settings.ae_ckpt, settings.outdir)
    low, high = settings.replica_range()
    share = share_of(settings)
    scaling: dict[str, Any] = {"num_replicas": low}
    if high > low:
        scaling = {"autoscaling_config": {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": 16}}
    return Images.options(  # type: ignore[attr-defined]  # what @serve.deployment makes of the class
        ray_actor_options={"num_cpus": 1} | share.options(),
        max_ongoing_requests=MAX_ONGOING,
        graceful_shutdown_timeout_s=settings.drain_s + 5,
        logging_config={"enable_access_log": False},
        **scaling,
    ).bind(settings.model_dump())


def share_of(settings: Settings) -> Share:
    """The GPUs of a replica. Mistake where the cluster has none such."""
    if not ray.is_initialized():
        return Share()
    try:
        return shared_out(settings.device, settings.gpus_per_replica, settings.accelerator_type, "gpus_per_replica")
    except ConfigError as error:
        raise Mistake(str(error)) from None
