"""Deployments that the service is measured against."""

import base64
from pathlib import Path
from typing import Any

import torch
from ray import serve
from ray.serve import Application

from ldm_ray.data.images import encode_png
from ldm_ray.engine.generator import Generator

QUIET = {"enable_access_log": False}


@serve.deployment(num_replicas=1, max_ongoing_requests=2048, logging_config=QUIET, ray_actor_options={"num_cpus": 0})
class Empty:
    """Does nothing."""

    def __call__(self, request: Any) -> str:
        return "{}"


@serve.deployment(num_replicas=1, max_ongoing_requests=2048, logging_config=QUIET, ray_actor_options={"num_cpus": 0})
class Reading:
    """Does nothing but read the request's body, which Serve's Python proxy hands over in calls of its own."""

    async def __call__(self, request: Any) -> str:
        await request.body()
        return "{}"


@serve.deployment(num_replicas=1, max_ongoing_requests=2048, logging_config=QUIET, ray_actor_options={"num_cpus": 0})
class OneByOne:
    """What a straightforward service does: a batch of its own for each request."""

    def __init__(self, ckpt: str) -> None:
        torch.set_num_threads(2)
        self.generator = Generator.open(Path(ckpt))

    def __call__(self, request: Any) -> dict[str, Any]:
        seed = int(request.query_params["seed"])
        image = self.generator([seed], [seed % 10])[0, 0]
        return {"data": [{"b64_json": base64.b64encode(encode_png(image.numpy())).decode(), "seed": seed}]}


empty = Empty.bind()  # type: ignore[attr-defined]
reading = Reading.bind()  # type: ignore[attr-defined]


def one_by_one(args: dict[str, str]) -> Application:
    return OneByOne.bind(args["ckpt"])  # type: ignore[attr-defined]
