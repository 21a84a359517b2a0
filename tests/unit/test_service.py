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
from ldm_ray.service import bodies, encoder, media
from ldm_ray.service.errors import ApiError
from ldm_ray.service.media import Made
from tests.helpers.asgi import POST, InProcess, in_process
from tests.helpers.checkpoints import write_small_checkpoint


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory, ae_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("served")
    return write_small_checkpoint(folder / "small.pt", ae_file)


@pytest.fixture(scope="module")
def small(ckpt: Path) -> Iterator[InProcess]:
    with in_process(ckpt) as running:
        yield running


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


# --- bodies that do not come ---


def test_half_a_body_is_408_after_its_deadline(ckpt: Path) -> None:
    with in_process(ckpt, body_s=0.2) as running:
        for parts in ([], [b"{"], [b'{"prompt"', b': "7"']):
            answer = running.ask(POST, parts=parts)
            assert (
                answer.status == 408 and answer.error["code"] == "body_timeout" and "0.2 s" in answer.error["message"]
            )


def test_half_sent_bodies_shut_nobody_out(small: InProcess) -> None:
    """Those that take longest make room before their deadline."""
    more = 20

    async def crowd() -> tuple[int, list[int]]:
        held = [asyncio.create_task(small.send(POST, parts=[b"{"])) for _ in range(bodies.AWAITED + more)]
        await asyncio.sleep(0)
        answer = await asyncio.wait_for(small.send(POST, {"prompt": "7", "seed": 1}), 5)
        ended = [task.result().status for task in held if task.done()]
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        return answer.status, ended

    status, ended = small.run(crowd())
    assert status == 200 and ended == [408] * (more + 1)


def test_empty_compressed_and_other_bodies_get_words_that_help(small: InProcess) -> None:
    for body in (b"", b" \n"):
        error = small.ask(POST, body).error
        assert error["code"] == "empty_body" and '{"prompt": "7"}' in error["message"]
    assert small.ask(POST, method="POST").error["code"] == "empty_body"  # without any header
    for more in ({"content_encoding": "gzip"}, {}):
        answer = small.ask(POST, b"\x1f\x8b\x08\x00rest", **more)
        assert answer.status == 415 and "compressed (gzip)" in answer.error["message"]
    assert small.ask(POST, {"prompt": "7"}, content_encoding="identity").status == 200
    assert "not JSON" in small.ask(POST, b"{").error["message"]
    for body in (b"[]", b"7", b"null", b'"x"'):
        assert "must be a JSON object" in small.ask(POST, body).error["message"]
    error = small.ask(POST, b"n=1", content_type="application/x-www-form-urlencoded").error
    assert "Content-Type: application/json, not application/x-www-form-urlencoded" in error["message"]


def test_what_a_client_sent_is_not_repeated_at_length(small: InProcess) -> None:
    for answer in (
        small.ask("/nothing" + "x" * 5000),
        small.ask(POST, {"k" * 100_000: 1}),
        small.ask(POST, {"prompt": "k" * 1000}),
        small.ask(POST, {"model": "m" * 200}),
        small.ask(f"/v1/models/{'m' * 5000}"),
        small.ask(f"/static/{'m' * 5000}"),
        small.ask(POST, {}, method="M" * 5000),
        small.ask(POST, b"{}", content_type="t" * 5000),
        small.ask(POST, {"n": 10**4000}),
        small.ask(f"/v1/latents/map?{'q' * 5000}=1"),
        small.ask(f"/v1/latents/map?n={'9' * 5000}"),
    ):
        assert 400 <= answer.status < 500 and answer.error and len(answer.body) < 1000, answer.body[:100]


# --- what HTTP clients expect ---


def test_null_means_left_out_for_every_optional_field(small: InProcess) -> None:
    schemas = small.app.openapi()["components"]["schemas"]
    end = {"seed": 1, "class_label": 3}
    requests: list[tuple[str, str, dict[str, Any]]] = [
        (POST, "GenerationRequest", {"prompt": "7", "seed": 1}),
        (POST, "GenerationRequest", {"class_label": [7, None], "seeds": [1, 2], "n": 2}),
        ("/v1/images/interpolations", "InterpolationRequest", {"start": end, "end": end}),
        ("/v1/latents/decode", "DecodeRequest", {"latents": [[0.5] * 16]}),
    ]
    for path, name, body in requests:
        wanted = small.ask(path, body)
        assert wanted.status == 200
        for field, schema in schemas[name]["properties"].items():
            if field in body:
                continue
            assert {"type": "null"} in schema["anyOf"], field
            answer = small.ask(path, body | {field: None})
            assert answer.status == 200 and answer.json["data"] == wanted.json["data"], (field, answer.body[:200])
    assert small.ask("/v1/latents/decode", {"latents": None}).error["code"] == "missing_parameter"
    assert small.ask(POST, {"nothing": None}).error["code"] == "unknown_parameter"
    empty = small.ask("/v1/images/small/7/1.png?steps=&guidance=&sampler=&scale=")
    assert empty.status == 200 and empty.body == small.ask("/v1/images/small/7/1.png").body


def test_options_that_ask_for_what_is_done_anyway_are_accepted(small: InProcess) -> None:
    body = {"prompt": "7", "seed": 1}
    wanted = small.ask(POST, body).json["data"]
    options: dict[str, list[Any]] = {
        "size": ["auto", "28x28"],
        "output_format": ["png"],
        "output_compression": [100, 100.0],
        "quality": ["auto", "standard"],
        "background": ["auto", "opaque"],
        "moderation": ["auto", "low"],
        "user": ["me"],
        "stream": [False],
        "partial_images": [0],
        "response_format": ["b64_json"],
    }
    for name, values in options.items():
        for value in values:
            answer = small.ask(POST, body | {name: value})
            assert answer.status == 200 and answer.json["data"] == wanted, (name, value, answer.body[:200])
    for name, value in {"output_format": "webp", "quality": "hd", "background": "transparent"}.items():
        assert small.ask(POST, body | {name: value}).error["param"] == name


def test_head_is_answered_wherever_get_is(small: InProcess) -> None:
    for path in ("/", "/health", "/ready", "/v1/models", "/v1/models/small", "/v1/images/small/7/1.png", "/docs",
                 "/openapi.json", "/metrics", "/static/app.js", "/nothing", "/v1/latents/map?n=10"):  # fmt: skip
        head, get = small.ask(path, method="HEAD"), small.ask(path)
        assert (head.status, head.body) == (get.status, b""), path
        assert head.headers["content-type"] == get.headers["content-type"]
        if path != "/metrics":
            assert head.headers["content-length"] == str(len(get.body)), path
    assert small.ask("/health", method="DELETE").headers["allow"] == "GET, HEAD"
    assert small.ask(POST, method="HEAD").status == 405


def test_no_redirect_repeats_a_host(small: InProcess) -> None:
    answer = small.ask("/v1/models/", host="evil.example")
    assert answer.status == 404 and "location" not in answer.headers
    assert small.ask("/nothing", host="[").status == 404


def test_pages_of_other_origins_may_ask_only_where_a_setting_says_so(ckpt: Path) -> None:
    origin, asks = "https://a.example", {"access_control_request_method": "POST"}
    with in_process(ckpt, token="t") as running:
        answer = running.ask("/health", origin=origin)
        assert answer.status == 200 and not any(name.startswith("access-control") for name in answer.headers)
        assert running.ask(POST, method="OPTIONS", origin=origin, **asks).status == 401
    with in_process(ckpt, token="t", cors="https://a.example, https://b.example/") as running:
        for allowed in (origin, "https://b.example"):
            preflight = running.ask(POST, method="OPTIONS", origin=allowed, **asks)
            assert preflight.status == 204 and preflight.headers["access-control-allow-origin"] == allowed
            assert "POST" in preflight.headers["access-control-allow-methods"]
            assert "Authorization" in preflight.headers["access-control-allow-headers"]
            for answer in (running.ask("/health", origin=allowed), running.ask(POST, {}, origin=allowed)):  # 200, 401
                assert answer.headers["access-control-allow-origin"] == allowed and answer.headers["vary"] == "Origin"
        for other in ("https://c.example", "null", "https://a.example.c.example"):
            assert running.ask(POST, method="OPTIONS", origin=other, **asks).status == 401
            assert "access-control-allow-origin" not in running.ask("/health", origin=other).headers
    with in_process(ckpt, cors="*") as running:
        assert running.ask("/health", origin="null").headers["access-control-allow-origin"] == "*"


def test_a_route_prefix_changes_nothing_but_the_addresses(ckpt: Path) -> None:
    with in_process(ckpt, token="t", max_body=1024) as running:
        for path in ("/health", "/ready"):
            assert running.ask(path, root="/x/y").status == 200
        assert running.ask("/v1/models", root="/x/y").status == 401
        token = {"authorization": "Bearer t", "root": "/x/y"}
        assert running.ask("/v1/models", **token).status == running.ask(POST, {"prompt": "7"}, **token).status == 200
        assert running.ask(POST, b"{" + b" " * 2000 + b"}", **token).status == 413
        assert running.ask(POST, b"{}", content_type="text/plain", **token).status == 415
        page = running.ask("/", **token).body
        assert b'src="static/app.js"' in page and b'"/' not in page.replace(b'"/>', b"")
        assert running.ask("", **token).headers["location"] == "y/"


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
    wanted = {"a": 1, "data": [media.item(made, 1) for made in images]}
    assert told == json.dumps(wanted, separators=(",", ":")).encode()
