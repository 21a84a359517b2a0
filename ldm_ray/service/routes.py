"""Every route of the service as one FastAPI application."""

import asyncio
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Header, Query, Request, Response
from starlette.responses import StreamingResponse

import ldm_ray
from ldm_ray.engine.items import png
from ldm_ray.engine.schema import GenerationRequest, settled
from ldm_ray.service import latents, media
from ldm_ray.service.errors import ApiError, install, invalid, json_response
from ldm_ray.service.gate import Gate
from ldm_ray.service.library import Served, stamp_or_none
from ldm_ray.service.schemas import (
    DecodeRequest,
    ErrorResponse,
    ImagesResponse,
    InterpolationRequest,
    MapQuery,
    Permalink,
)
from ldm_ray.service.service import CACHED, Order, Service
from ldm_ray.service.stream import events, moments
from ldm_ray.settings.limits import MAX_SEED, SIDE

STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
Accept = Annotated[str | None, Header(description=", ".join(media.KINDS))]
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorResponse} for code in (400, 401, 404, 406, 408, 413, 415, 429, 500, 503)
}
IMAGES: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {
        "model": ImagesResponse,
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in media.KINDS[1:]},
    },
}


def build(service: Service) -> FastAPI:
    """The application over one replica's service."""
    app = FastAPI(
        title="ldm_ray", version=ldm_ray.__version__, description="Digits by latent diffusion.", redirect_slashes=False
    )  # a redirect would repeat the Host header that a client sent
    install(app)
    images(app, service)
    models(app, service)
    page(app)
    takes_json = frozenset(path for path, methods in app.openapi()["paths"].items() if "post" in methods)
    app.add_middleware(Gate, service=service, json_paths=takes_json)  # type: ignore[arg-type]
    return app


def images(app: FastAPI, service: Service) -> None:
    @app.post("/v1/images/generations", responses=IMAGES, tags=["images"])
    async def generations(body: GenerationRequest, request: Request, accept: Accept = None) -> Response:
        """Makes images. OpenAI's client library works with it; see the fields for what goes beyond."""
        kinds = (*media.KINDS, "text/event-stream") if body.stream else media.KINDS
        kind = media.negotiate(accept, kinds)
        order = await service.order(body)
        request.state.told = {"images": body.n, "steps": order.steps}
        if body.stream:
            order = replace(order, show=moments(order.steps, body.partial_images or 0))
            service.admit(order)  # while an answer can still be an error
            stream = events(service, order, head(order))
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        if kind == media.GIF:
            order = replace(order, show=moments(order.steps, media.GIF_FRAMES - 1))
        return await answer(service, order, kind)

    @app.post("/v1/images/interpolations", responses=IMAGES, tags=["latents"])
    async def interpolations(body: InterpolationRequest, accept: Accept = None) -> Response:
        """Makes the images between two seeds, through the latents of both."""
        kind = media.negotiate(accept)
        order = await latents.interpolation(service, body)
        return await answer(service, order, kind, sequence=True)

    @app.post("/v1/latents/decode", responses=IMAGES, tags=["latents"])
    async def decode(body: DecodeRequest, accept: Accept = None) -> Response:
        """Makes the images of whitened latents."""
        kind = media.negotiate(accept)
        return await answer(service, await latents.decode(service, body), kind, sequence=True)

    @app.get("/v1/latents/map", responses=ERRORS, tags=["latents"])
    async def latent_map(query: Annotated[MapQuery, Query()]) -> Response:
        """Latents of generated images in a plane: a point is the latent origin + x·axes[0] + y·axes[1]."""
        return json_response(await latents.latent_map(service, query.model, query.n, query.seed))

    @app.get(
        "/v1/images/{model}/{label}/{seed}.png",
        responses={**ERRORS, 200: {"content": {media.PNG: {}}}, 304: {"description": "not changed"}},
        tags=["images"],
        response_class=Response,
    )
    async def permalink(
        model: str,
        label: str,
        seed: str,
        query: Annotated[Permalink, Query()],
        if_none_match: Annotated[str | None, Header()] = None,
    ) -> Response:
        """One image whose address fixes its bytes. label: a digit, or none."""
        served = await service.library.get(model)
        if not (seed.isascii() and seed.isdigit() and len(seed) <= 10 and int(seed) <= MAX_SEED):
            raise invalid("seed", f"a seed is 0 to {MAX_SEED}")
        if label != "none" and not (label.isascii() and label.isdigit() and len(label) <= 4):
            raise invalid("label", "a label is a digit, or none")
        labels = service.labels(served, [None if label == "none" else int(label)])
        plan, steps, guidance = served.generator.plan, query.steps, query.guidance
        sampling = settled(plan, sampler=query.sampler, num_inference_steps=steps, guidance_scale=guidance)
        order = Order([int(seed)], labels, sampling, served=served, scale=query.scale)
        return await one_image(service, order, if_none_match)


async def one_image(service: Service, order: Order, if_none_match: str | None) -> Response:
    """A permalink's PNG, or 304."""
    import hashlib

    model = order.served.generator.sha256, order.served.name
    key = (*model, order.seeds[0], order.labels[0], order.sampling, order.scale)
    data = service.cache.get(key)
    if data is None:
        with service.taken(order):
            data = png(service.made(order, await service.run(order))[0], order.scale)
        remember(service.cache, key, data)
    tag = f'"{hashlib.sha256(data).hexdigest()}"'
    reach = "private" if service.settings.token else "public"
    headers = {"ETag": tag, "Cache-Control": f"{reach}, max-age=31536000, immutable"}
    asked = [part.strip().removeprefix("W/") for part in (if_none_match or "").split(",")]
    if tag in asked or "*" in asked:
        return Response(None, 304, headers)
    return Response(data, 200, headers, media.PNG)


def remember(cache: OrderedDict[tuple[object, ...], bytes], key: tuple[object, ...], data: bytes) -> None:
    """Keeps the newest, up to so many; large pictures are not kept."""
    if len(data) < 65_536:
        cache[key] = data
        if len(cache) > CACHED:
            cache.popitem(last=False)


async def answer(service: Service, order: Order, kind: str, sequence: bool = False) -> Response:
    """The images of an order in the kind asked for. sequence: its images are themselves the frames of a GIF."""
    frames: dict[int, np.ndarray] = {}

    def keep(i: int, step: int, pixels: np.ndarray) -> None:
        if step not in frames:
            frames[step] = np.zeros((len(order.seeds), *pixels.shape), dtype=np.uint8)
        frames[step][i] = pixels

    with service.taken(order):
        deadline = service.deadline()
        made = service.made(order, await service.run(order, keep, deadline))
        started = time.perf_counter()
        if kind == media.JSON:
            parts = media.json_parts(head(order), made, order.scale)
        elif kind == media.GIF:
            last = media.stack(made)
            pictures = [frame[None] for frame in last] if sequence else [*(frames[s] for s in sorted(frames)), last]
            parts = media.film(pictures, order.scale)
        else:
            parts = media.parts(kind, made, order.scale, order.text())
        data = await service.encoder.encode(parts, order.pixels, deadline)
    service.metrics.stages.labels("encode").observe(time.perf_counter() - started)
    return Response(data, media_type=kind)


def head(order: Order) -> dict[str, Any]:
    """What a JSON answer says of all images."""
    told: dict[str, Any] = {"created": int(time.time()), "model": order.served.name, "output_format": "png"}
    told |= {"size": f"{SIDE * order.scale}x{SIDE * order.scale}", "fingerprint": order.served.fingerprint}
    if order.sampling is not None:
        told |= {"num_inference_steps": order.steps, "sampler": order.sampling.sampler}
        told["guidance_scale"] = order.sampling.guidance_scale
    return told


def models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses=ERRORS, tags=["models"])
    async def every_model() -> Response:
        """The checkpoints; the served one first. What is not loaded is loaded when it is asked for."""
        library, paths = service.library, await service.library.known()
        stamps = await asyncio.to_thread(lambda: {name: stamp_or_none(path) for name, path in paths.items()})
        data = []
        for name, stamp in stamps.items():
            if name in library.loaded:
                data.append(describe(service, library.loaded[name]))
            elif stamp is not None:  # not deleted since
                told = {"id": name, "object": "model", "owned_by": "ldm_ray", "created": stamp[0] // 10**9}
                data.append(told | {"loaded": False})
        return json_response({"object": "list", "data": data})

    @app.get("/v1/models/{model}", responses=ERRORS, tags=["models"])
    async def one_model(model: str) -> Response:
        """One checkpoint, loaded if need be."""
        return json_response(describe(service, await service.library.get(model)))

    @app.get("/health", tags=["health"])
    async def health() -> Response:
        """Alive."""
        return json_response({"status": "ok"})

    @app.get("/ready", responses={503: {"model": ErrorResponse}}, tags=["health"])
    async def ready() -> Response:
        """A warm-up image has been made, and new work is taken."""
        if service.draining:
            raise ApiError(503, "the server is stopping", headers={"Retry-After": "5"})
        return json_response({"status": "ready", "model": service.library.default.name})

    @app.get("/metrics", tags=["health"], response_class=Response)
    async def metrics() -> Response:
        """Figures of this replica for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def describe(service: Service, served: Served) -> dict[str, Any]:
    return served.describe(service.settings) | {"default": served is service.library.default}


def page(app: FastAPI) -> None:
    files = {path.name: path for path in sorted(STATIC.iterdir()) if path.suffix in TYPES}

    def give(name: str) -> Response:
        path = files[name]
        headers = {"Cache-Control": "no-cache", "Content-Security-Policy": POLICY}
        return Response(path.read_bytes(), 200, headers, TYPES[path.suffix])

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return give("index.html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"there is no {name[:100]}")
        return give(name)
