"""What the service does with requests as HTTP clients send them: bodies, nulls, HEAD, origins, prefixes. In-process."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from ldm_ray.service import bodies
from tests.helpers.asgi import POST, InProcess, in_process

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
