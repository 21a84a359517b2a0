"""Images as server-sent events: each while it is being denoised, then finished."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np

from ldm_ray.data.images import encode_png
from ldm_ray.slot_jobs import Job
from serve.errors import ApiError, internal
from serve.media import enlarged, items
from serve.service import Order, Service

Put = Callable[[tuple[int, int, np.ndarray] | None], None]


def moments(steps: int, count: int) -> list[int]:
    """``count`` steps (or all, where there are fewer) evenly before the last of ``steps``."""
    return sorted(
        {min(steps - 1, max(1, round(i * steps / (count + 1)))) for i in range(1, count + 1)} if steps > 1 else []
    )


def event(kind: str, told: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | told, separators=(',', ':'))}\n\n".encode()


async def events(
    service: Service, order: Order, partial_images: int, scale: int, head: dict[str, Any]
) -> AsyncIterator[bytes]:
    """``image_generation.partial_image`` and ``image_generation.completed`` for each image, as OpenAI's; ``error``."""
    show = moments(order.steps, partial_images)
    queue: asyncio.Queue[tuple[int, int, np.ndarray] | None] = asyncio.Queue()
    task = asyncio.create_task(service.run(order, show, lambda i, step, pixels: queue.put_nowait((i, step, pixels))))
    task.add_done_callback(lambda _: queue.put_nowait(None))
    common = {"created_at": head["created"], "size": head["size"], "output_format": "png"}
    common |= {"quality": "auto", "background": "opaque"}
    try:
        while (shown := await queue.get()) is not None:
            i, step, pixels = shown
            png = base64.b64encode(encode_png(enlarged(pixels, scale))).decode()
            where = {"index": i, "partial_image_index": show.index(step), "step": step, "steps": order.steps}
            yield event("image_generation.partial_image", common | where | {"b64_json": png})
        job: Job = await task
        usage: dict[str, Any] = {"total_tokens": 0, "input_tokens": 0, "output_tokens": 0}
        usage |= {"input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}
        for i, item in enumerate(items(service.made(order, job), scale)):
            if "error" in item:
                yield event("image_generation.failed", {"index": i, **item})
            else:
                yield event(
                    "image_generation.completed", common | {"index": i, "usage": usage, "model": head["model"]} | item
                )
    except ApiError as error:
        yield event("error", error.body())
    except Exception as error:
        yield event("error", internal(error).body())
    finally:
        task.cancel()
