"""One client must not take the service from the others: bounds on answers and bodies, and what may not be held up.

The application is called in-process, without Ray and without a server.
"""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_ray.data.images import enlarged, gif_parts
from ldm_ray.engine.items import Made, item
from ldm_ray.service import encoder, media
from ldm_ray.service.errors import ApiError
from tests.helpers.asgi import POST, InProcess, in_process


async def longest_wait(work: asyncio.Future[Any]) -> float:
    """Seconds of the longest time for which the event loop did nothing else while the work went on."""
    longest = 0.0
    while not work.done():
        started = time.perf_counter()
        await asyncio.sleep(0.001)
        longest = max(longest, time.perf_counter() - started)
    return longest


# --- how much an answer may be ---


@pytest.mark.parametrize(
    ("body", "accept"),
    [
        ({"n": 256, "size": "448x448", "num_inference_steps": 40}, "image/gif"),
        ({"n": 256, "size": "448x448", "num_inference_steps": 40, "stream": True, "partial_images": 16}, "*/*"),
        ({"n": 256, "size": "448x448", "num_inference_steps": 2}, "image/gif"),
    ],
)
def test_an_answer_of_too_many_pixels_is_400_before_anything_is_made(
    small: InProcess, body: dict[str, Any], accept: str
) -> None:
    before = small.service.library.default.slots.figures.images
    answer = small.ask(POST, body | {"prompt": "7"}, accept=accept)
    assert answer.status == 400 and answer.error["code"] == "too_many_pixels"
    frames = {"image/gif": min(40, body["num_inference_steps"]), "*/*": 17}[accept]
    assert f"{256 * 448 * 448 * frames:,} pixels" in answer.error["message"]
    assert "at most 67,108,864" in answer.error["message"]
    assert small.service.library.default.slots.figures.images == before and small.service.pixels == 0


def test_the_bound_on_pixels_is_a_setting_of_every_kind_of_answer(ckpt: Path) -> None:
    with in_process(ckpt, max_pixels=4 * 784) as running:
        for accept in media.KINDS:
            few, many = (
                running.ask(POST, {"n": n, "prompt": "7", "num_inference_steps": 1}, accept=accept) for n in (4, 5)
            )
            assert (few.status, many.status) == (200, 400), accept
        assert running.ask(POST, {"n": 2, "prompt": "7", "num_inference_steps": 3}, accept="image/gif").status == 400
        assert running.ask("/v1/images/small/7/1.png?scale=3").error["code"] == "too_many_pixels"
        ends = {"start": {"seed": 1}, "end": {"seed": 2}, "n": 5}
        assert running.ask("/v1/images/interpolations", ends).error["code"] == "too_many_pixels"
        latents = {"latents": [[0.0] * 16], "size": "84x84"}
        assert running.ask("/v1/latents/decode", latents).error["code"] == "too_many_pixels"


def test_more_pixels_than_there_is_room_for_at_once_are_429(ckpt: Path) -> None:
    with in_process(ckpt, max_pixels=16 * 784) as running:

        async def crowd() -> list[int]:
            body = {"n": 16, "prompt": "7", "num_inference_steps": 8}
            answers = await asyncio.gather(*(running.send(POST, body) for _ in range(12)))
            for answer in answers:
                assert answer.status == 200 or int(answer.headers["retry-after"]) >= 1
            return [answer.status for answer in answers]

        assert sorted(running.run(crowd())) == [200] * 8 + [429] * 4
        assert running.service.pixels == 0


# --- what may not be held up ---


@pytest.mark.parametrize("accept", [media.GIF, media.JSON, media.NPY, media.ZIP, media.PNG])
def test_the_largest_answers_leave_the_event_loop_free(small: InProcess, accept: str) -> None:
    large: dict[str, Any] = {"n": 160, "size": "448x448", "prompt": "7", "seed": 1, "num_inference_steps": 2}

    async def both() -> tuple[set[int], float]:
        work = asyncio.gather(*(small.send(POST, large, accept=accept) for _ in range(2)))
        longest = await longest_wait(work)
        return {answer.status for answer in await work}, longest

    statuses, longest = small.run(both())
    assert statuses == {200} and longest < 1.0


def test_streams_leave_the_event_loop_free(small: InProcess) -> None:
    body = {"n": 20, "size": "448x448", "prompt": "7", "stream": True, "partial_images": 8, "num_inference_steps": 9}

    async def all_of_them() -> tuple[list[Any], float]:
        work = asyncio.gather(*(small.send(POST, body | {"seed": 20 * i}) for i in range(6)))
        longest = await longest_wait(work)
        return await work, longest

    answers, longest = small.run(all_of_them())
    assert longest < 1.0
    for answer in answers:
        events = [json.loads(block.split(b"data: ")[1]) for block in answer.body.strip().split(b"\n\n")]
        assert sum(event["type"].endswith("partial_image") for event in events) == 20 * 8
        assert [event["index"] for event in events[160:]] == list(range(20))
    assert small.service.pixels == 0


def test_encoding_ends_at_the_deadline_and_with_who_asked() -> None:
    made = 0

    def parts() -> Iterator[bytes]:
        nonlocal made
        while True:
            made += 1
            time.sleep(0.01)
            yield b"x"

    async def late_and_gone() -> None:
        working = encoder.Encoder()
        with pytest.raises(ApiError) as error:
            await working.encode(parts(), encoder.LARGE + 1, time.monotonic() + 0.1)
        assert error.value.status == 408
        task = asyncio.create_task(working.encode(parts(), encoder.LARGE + 1, time.monotonic() + 100))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.1)
        before = made
        await asyncio.sleep(0.1)
        assert made == before  # nobody goes on
        assert await working.encode(iter([b"a", b"b"]), encoder.LARGE + 1, time.monotonic() + 100) == b"ab"
        working.close()

    asyncio.run(late_and_gone())


def test_short_answers_do_not_wait_for_large_ones() -> None:
    def parts() -> Iterator[bytes]:
        while True:
            time.sleep(0.01)
            yield b"x"

    async def crowd() -> bool:
        working, deadline = encoder.Encoder(), time.monotonic() + 100
        large = [asyncio.create_task(working.encode(parts(), encoder.LARGE + 1, deadline)) for _ in range(20)]
        await asyncio.sleep(0.05)
        short = await asyncio.wait_for(working.encode(iter([b"a", b"b"]), encoder.INLINE + 1, deadline), 10)
        waiting = not any(task.done() for task in large)
        for task in large:
            task.cancel()
        await asyncio.gather(*large, return_exceptions=True)
        working.close()
        return waiting and short == b"ab"

    assert asyncio.run(crowd())


def test_what_a_body_holds_does_not_stop_the_event_loop(small: InProcess) -> None:
    """A megabyte of anything is parsed, and refused, well within a second."""
    hostile = [
        b"{" + b",".join(b'"k%d":1' % i for i in range(80_000)) + b"}",
        b"{" + b",".join(b'"k%d":null' % i for i in range(70_000)) + b"}",
        b'{"class_label":[' + b'"x",' * 250_000 + b"1]}",
        b'{"class_label":[' + b'{"a":1},' * 110_000 + b"1]}",
        b'{"seeds":[' + b"-1," * 300_000 + b"1]}",
        b'{"seeds":[' + b"1," * 500_000 + b"1]}",
        b'{"' + b"k" * 900_000 + b'":1}',
    ]
    for body in hostile:
        started = time.perf_counter()
        answer = small.ask(POST, body)
        assert answer.status == 400 and len(answer.body) < 1000, body[:40]
        assert time.perf_counter() - started < 5, body[:40]


# --- the same bytes, in parts ---


def test_a_gif_in_parts_shows_what_pillow_writes() -> None:
    dice = np.random.default_rng(0)
    frames = [dice.integers(0, 256, (30, 40), dtype=np.uint8)]
    for i in range(6):  # fewer and fewer pixels change
        frames.append(frames[-1].copy())
        frames[-1][: 12 - 2 * i, 5 : 20 - i] = dice.integers(0, 256, (12 - 2 * i, 15 - i))
    frames += [frames[-1].copy(), frames[-1].copy()]
    for count in (1, 2, len(frames)):
        for scale in (1, 3):
            ours: Any = Image.open(io.BytesIO(b"".join(gif_parts(frames[:count], scale))))
            first, *rest = (Image.fromarray(enlarged(frame, scale)) for frame in frames[:count])
            buffer = io.BytesIO()
            durations = [80] * (count - 1) + [1500]
            first.save(buffer, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
            theirs: Any = Image.open(buffer)
            assert (ours.n_frames, ours.size, ours.info["loop"]) == (theirs.n_frames, theirs.size, 0)
            for i in range(ours.n_frames):
                ours.seek(i), theirs.seek(i)
                assert ours.info["duration"] == theirs.info["duration"]
                np.testing.assert_array_equal(np.asarray(ours.convert("L")), np.asarray(theirs.convert("L")))


def test_parts_are_the_bytes_of_the_whole() -> None:
    dice = np.random.default_rng(0)
    images = [Made(dice.integers(0, 256, (28, 28), dtype=np.uint8), i, 7, {"seed": str(i)}) for i in range(3)]
    images.append(Made(None, 3, 7, {}, {"message": "no"}))
    npy = b"".join(media.parts(media.NPY, images, 2, {}))
    buffer = io.BytesIO()
    np.save(buffer, enlarged(media.stack(images), 2))
    assert npy == buffer.getvalue()
    told = b"".join(media.json_parts({"a": 1}, images, 1))
    wanted = {"a": 1, "data": [item(made, 1) for made in images]}
    assert told == json.dumps(wanted, separators=(",", ":")).encode()
