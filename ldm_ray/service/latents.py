"""The latent space over HTTP: between two images, from numbers to an image, and a map of it."""

import torch

from ldm_ray.engine.schema import sampling_of, scale_of, settled
from ldm_ray.latents.paths import interpolate, plane
from ldm_ray.service.errors import ApiError, invalid
from ldm_ray.service.library import Served
from ldm_ray.service.schemas import DecodeRequest, InterpolationRequest
from ldm_ray.service.service import Order, Service


async def interpolation(service: Service, request: InterpolationRequest) -> Order:
    """An order of the images from one to another, straight or along the sphere through their latents (D)."""
    served = await service.library.get(request.model)
    labels = service.labels(served, [request.start.class_label, request.end.class_label])
    sampling = sampling_of(request, served.generator.plan)
    ends = Order([request.start.seed, request.end.seed], labels, sampling, served=served)
    with service.taken(ends):
        job = await service.run(ends)
    service.made(ends, job)
    start, end = job.latents
    return decoding(served, interpolate(start, end, request.n, request.method), request.size)


async def decode(service: Service, request: DecodeRequest) -> Order:
    """An order of the images of given latents."""
    served = await service.library.get(request.model)
    dim = served.generator.codec.latent_dim
    if any(len(row) != dim for row in request.latents):
        raise invalid("latents", f"each of the latents is {dim} numbers")
    return decoding(served, torch.tensor(request.latents, dtype=torch.float32), request.size)


def decoding(served: Served, latents: torch.Tensor, size: str) -> Order:
    count = len(latents)
    return Order([0] * count, [None] * count, None, latents, served=served, scale=scale_of(size))


async def latent_map(service: Service, model: str | None, n: int, seed: int) -> dict[str, object]:
    """n images' latents in the plane that holds most of what tells the digits apart.

    A point (x, y) of the plane is the latent ``origin + x·axes[0] + y·axes[1]``.
    """
    served = await service.library.get(model)
    labels = service.labels(served, served.generator.in_turn(n))
    order = Order(range(seed, seed + n), labels, settled(served.generator.plan), served=served)
    with service.taken(order):
        job = await service.run(order)
    service.made(order, job)
    if any(outcome is None or outcome.value != "done" for outcome in job.outcomes):
        raise ApiError(500, "some images came out as numbers that are not finite", code="not_finite")
    latents = job.latents.double().numpy()  # (n, D)
    origin, axes = plane(latents, labels)
    points = (latents - origin) @ axes.T
    return {
        "model": served.name,
        "origin": origin.tolist(),
        "axes": axes.tolist(),
        "points": [
            {"x": float(x), "y": float(y), "label": label, "seed": drawn}
            for (x, y), label, drawn in zip(points, labels, order.seeds, strict=True)
        ],
    }
