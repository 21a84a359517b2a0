"""What the service refuses, and how: always 4xx, always JSON, never a path."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.service import POST, TOKEN, Server

INVALID: list[tuple[dict[str, Any], str | None]] = [
    ({"n": 0}, "n"),
    ({"n": 257}, "n"),
    ({"n": -1}, "n"),
    ({"n": "2"}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": True}, "n"),
    ({"n": 10**400}, "n"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "horse"}, "prompt"),
    ({"prompt": "12"}, "prompt"),
    ({"prompt": "seven eight"}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": "٣"}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": "7" * 1001}, "prompt"),
    ({"class_label": 10}, "class_label"),
    ({"class_label": -1}, None),
    ({"class_label": "7"}, None),
    ({"class_label": [1, 2]}, None),
    ({"class_label": []}, None),
    ({"class_label": [True]}, None),
    ({"size": "28"}, "size"),
    ({"size": "30x30"}, "size"),
    ({"size": "0x0"}, "size"),
    ({"size": "28x56"}, "size"),
    ({"size": "476x476"}, "size"),
    ({"size": "２８x28"}, "size"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"num_inference_steps": 1001}, "num_inference_steps"),
    ({"num_inference_steps": "8"}, "num_inference_steps"),
    ({"sampler": "euler"}, "sampler"),
    ({"sampler": ["ddim"]}, "sampler"),
    ({"guidance_scale": -0.1}, "guidance_scale"),
    ({"guidance_scale": 20.01}, "guidance_scale"),
    ({"guidance_scale": "2"}, "guidance_scale"),
    ({"guidance_scale": True}, "guidance_scale"),
    ({"guidance_scale": float("nan")}, "guidance_scale"),
    ({"guidance_scale": float("inf")}, "guidance_scale"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**32}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**32 - 1, "n": 2}, None),
    ({"seeds": []}, "seeds"),
    ({"seeds": [1, 2]}, None),
    ({"seeds": [-1]}, "seeds.0"),
    ({"seed": 1, "seeds": [1]}, None),
    ({"response_format": "url"}, "response_format"),
    ({"stream": "yes"}, "stream"),
    ({"partial_images": 17, "stream": True}, "partial_images"),
    ({"partial_images": -1, "stream": True}, "partial_images"),
    ({"partial_images": 2}, None),
    ({"model": 1}, "model"),
    ({"quality": "hd"}, "quality"),
    ({"__proto__": 1}, "__proto__"),
]


@pytest.mark.parametrize(("body", "param"), INVALID, ids=[str(body)[:40] for body, _ in INVALID])
def test_invalid_parameters_are_400(server: Server, body: dict[str, Any], param: str | None) -> None:
    answer = server.ask(POST, body)
    assert answer.status == 400, answer.body
    error = answer.error
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param, error


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"7", b"null", b'"x"', b"\xff\xfe", b"[" * 50_000, b'{"n":' + b"9" * 5000 + b"}"]
)
def test_bodies_that_are_no_request_are_400(server: Server, body: bytes) -> None:
    answer = server.ask(POST, body)
    assert answer.status == 400 and answer.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/images/latent-diffusion-main/7/-1.png", 400),
        ("/v1/images/latent-diffusion-main/7/4294967296.png", 400),
        ("/v1/images/latent-diffusion-main/7/1e3.png", 400),
        ("/v1/images/latent-diffusion-main/10/1.png", 400),
        ("/v1/images/latent-diffusion-main/seven/1.png", 400),
        ("/v1/images/latent-diffusion-main/7/1.png?steps=0", 400),
        ("/v1/images/latent-diffusion-main/7/1.png?steps=1001", 400),
        ("/v1/images/latent-diffusion-main/7/1.png?guidance=nan", 400),
        ("/v1/images/latent-diffusion-main/7/1.png?sampler=x", 400),
        ("/v1/images/latent-diffusion-main/7/1.png?size=28", 400),
        ("/v1/images/nothing/7/1.png", 404),
        ("/v1/images/latent-diffusion-main/7/1.gif", 404),
        ("/v1/images/..%2f..%2fetc/7/1.png", 404),
        ("/v1/latents/map?n=5", 400),
        ("/v1/latents/map?n=x", 400),
        ("/v1/models/..", 404),
        ("/static/..%2fapp.py", 404),
        ("/static/app.py", 404),
        ("/nothing", 404),
    ],
)
def test_addresses_that_are_wrong(server: Server, path: str, status: int) -> None:
    answer = server.ask(path)
    assert answer.status == status and answer.error


def test_latents_that_are_wrong_are_400(server: Server) -> None:
    wrong: list[object] = [[], [[]], [[1.0] * 15], [[1.0] * 17], [[float("nan")] * 16], [["1"] * 16], [[1e9] * 16]]
    for latents in [*wrong, 7, None]:
        assert server.ask("/v1/latents/decode", {"latents": latents}).error["type"] == "invalid_request_error"
    end = {"seed": 1}
    for body in ({"start": end}, {"start": end, "end": {"seed": -1}}, {"start": end, "end": end, "n": 1}):
        assert server.ask("/v1/images/interpolations", body).status == 400


def test_other_refusals(server: Server) -> None:
    for path in ("/v1/models", "/v1/images/latent-diffusion-main/7/1.png"):
        answer = server.ask(path, {}, method="DELETE")
        assert answer.status == 405 and answer.error and answer.headers["allow"]
    assert server.ask(POST).status == server.ask("/v1/models", b"", method="POST").status == 405
    assert server.ask(POST, {"n": 1}, accept="text/html").status == 406
    assert server.ask(POST, {"n": 1}, accept="application/json;q=0").error["code"] == "not_acceptable"
    assert server.ask(POST, b"n=1", content_type="application/x-www-form-urlencoded").status == 415
    assert server.ask(POST, b"{}", content_type="text/plain").error["code"] == "unsupported_media_type"
    assert server.ask(POST, b'{"prompt": "' + b"7" * 1_100_000 + b'"}').error["code"] == "body_too_large"
    heavy = server.ask(
        POST, {"n": 256, "sampler": "ddpm", "guidance_scale": 3, "num_inference_steps": 1000, "prompt": "x"}
    )
    assert heavy.status == 400
    large = server.ask(POST, {"n": 256, "size": "448x448", "num_inference_steps": 40}, accept="image/gif")
    assert large.status == 400 and large.error["code"] == "too_many_pixels"
    for field in ("x_request_timeout_seconds", "x_request_disconnect_disabled"):  # switches of Ray's proxy
        assert server.ask("/v1/models", **{field: "0.000001"}).status == 200
    head = server.ask("/v1/models", method="HEAD")
    assert head.status == 200 and head.body == b"" and int(head.headers["content-length"]) > 100


def test_the_token_protects_everything_but_health(server: Server) -> None:
    for path in ("/health", "/ready"):
        assert server.ask(path, token=None).status == 200
    for path in ("/", "/v1/models", "/metrics", "/openapi.json", "/docs", "/static/app.js", "/v1/images/x/1/1.png"):
        for token in (None, "wrong"):
            answer = server.ask(path, token=token)
            assert answer.status == 401 and answer.error["code"] == "unauthorized", path
            assert "www-authenticate" in answer.headers
    assert server.ask(POST, {"n": 1}, token=None).status == 401
    basic = base64.b64encode(f"me:{TOKEN}".encode()).decode()
    assert server.ask("/", token=None, authorization=f"Basic {basic}").status == 200
    assert server.ask("/", token=None, authorization="Basic !").status == 401


def test_the_document_names_every_route(server: Server) -> None:
    document = server.ask("/openapi.json").json
    assert {POST, "/v1/images/{model}/{label}/{seed}.png", "/v1/images/interpolations", "/v1/latents/decode"} <= set(
        document["paths"]
    )
    fields = document["components"]["schemas"]["GenerationRequest"]
    assert fields["additionalProperties"] is False and fields["example"]["prompt"] == "seven"
    assert set(document["paths"][POST]["post"]["responses"]) >= {"200", "400", "408", "413", "415", "429", "503"}
    page = server.ask("/")
    assert page.headers["content-type"].startswith("text/html") and b"http://" not in page.body.replace(
        b"http://www.w3", b""
    )


def test_schemathesis_finds_no_server_error_and_nothing_undocumented(server: Server, tmp_path: Path) -> None:
    """Requests made from the OpenAPI document: all phases but stateful, with the service's own bounds."""
    address = f"http://127.0.0.1:{server.port}"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json", "--seed", "1", "--no-color"]
    command += ["--max-examples", "20", "--request-timeout", "60", "--continue-on-failure"]
    command += ["--header", f"Authorization: Bearer {TOKEN}", "--phases", "examples,coverage,fuzzing"]
    # Not asked: that everything the document allows is accepted. Which labels and latents there are is the model's.
    command += ["--exclude-checks", "positive_data_acceptance"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)  # it leaves a cache
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]
    assert "10/10" in found.stdout or "Tested: 10" in found.stdout, found.stdout[-1000:]
