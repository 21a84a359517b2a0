"""Images as server-sent events: each while it is being denoised, then finished."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from ldm_ray.data.images import encode_png, enlarged
from ldm_ray.engine.items import Made, item
from ldm_ray.service.errors import ApiError, internal
from ldm_ray.service.service import Order, Service

BATCH = 1024 * 1024  # pixels that are encoded in one go
Shown = tuple[int, int, np.ndarray]  # (image, step, pixels (H, W))


def moments(steps: int, count: int) -> list[int]:
    """``count`` steps (or all, where there are fewer) evenly before the last of ``steps``."""
    return sorted(
        {min(steps - 1, max(1, round(i * steps / (count + 1)))) for i in range(1, count + 1)} if steps > 1 else []
    )


def event(kind: str, told: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | told, separators=(',', ':'))}\n\n".encode()


async def events(service: Service, order: Order, head: dict[str, Any]) -> AsyncIterator[bytes]:
    """``image_generation.partial_image`` and ``image_generation.completed`` for each image, as OpenAI's; ``error``."""
    common = {"created_at": head["created"], "size": head["size"], "output_format": "png"}
    common |= {"quality": "auto", "background": "opaque"}
    usage: dict[str, Any] = {"total_tokens": 0, "input_tokens": 0, "output_tokens": 0}
    usage |= {"input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}
    each = order.pixels_of_one
    queue: asyncio.Queue[Shown | None] = asyncio.Queue()
    deadline = service.deadline()

    def partial(shown: Shown) -> bytes:
        i, step, pixels = shown
        png = base64.b64encode(encode_png(enlarged(pixels, order.scale))).decode()
        where = {"index": i, "partial_image_index": order.show.index(step), "step": step, "steps": order.steps}
        return event("image_generation.partial_image", common | where | {"b64_json": png})

    def final(i: int, made: Made) -> bytes:
        told = {"index": i} | item(made, order.scale)
        if "error" in told:
            return event("image_generation.failed", told)
        return event("image_generation.completed", common | {"usage": usage, "model": head["model"]} | told)

    with service.taken(order):
        task = asyncio.create_task(service.run(order, lambda *shown: queue.put_nowait(shown), deadline))
        task.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while batch := await shown_by_now(queue, max(1, BATCH // each)):
                yield await service.encoder.encode(map(partial, batch), len(batch) * each, deadline)
            images = service.made(order, await task)
            for first in range(0, len(images), max(1, BATCH // each)):
                some = images[first : first + max(1, BATCH // each)]
                events = (final(first + i, made) for i, made in enumerate(some))
                yield await service.encoder.encode(events, len(some) * each, deadline)
                await asyncio.sleep(0)
        except ApiError as error:
            yield event("error", {"error": error.body()})
        except Exception as error:
            yield event("error", {"error": internal(error).body()})
        finally:
            task.cancel()


async def shown_by_now(queue: asyncio.Queue[Shown | None], most: int) -> list[Shown]:
    """What is in the queue, up to so many, at least one; nothing at its end. Others get their turn before."""
    await asyncio.sleep(0)
    batch: list[Shown] = []
    while len(batch) < most and (not batch or not queue.empty()):
        shown = await queue.get()
        if shown is None:
            if batch:
                queue.put_nowait(None)
            break
        batch.append(shown)
    return batch
