"""The service as its clients see it: one real ``serve run``, its own ports, the official client library."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_generator import SCHEDULE, busy_denoiser

from ldm_ray import checkpoint
from ldm_ray.checkpoint import load_autoencoder
from ldm_ray.config import SamplingConfig
from ldm_ray.generator import Generator

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "a-secret-of-the-tests"
MAX_IMAGES = 2000
DEADLINE_S = 4
POST = "/v1/images/generations"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/json", self.body[:300]
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert "Traceback" not in error["message"] and str(ROOT) not in error["message"]
        return error


@dataclass(frozen=True)
class Server:
    port: int
    ckpt: Path
    generator: Generator

    def ask(
        self, path: str, body: Any = None, token: str | None = TOKEN, method: str | None = None, **headers: str
    ) -> Answer:
        """One request; a dict goes as JSON, bytes as they are."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        if data is not None:
            told.setdefault("content-type", "application/json")
        if token:
            told["authorization"] = f"Bearer {token}"
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, told, method=method)
        try:
            with urllib.request.urlopen(request, timeout=100) as found:
                return Answer(found.status, {k.lower(): v for k, v in found.headers.items()}, found.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())

    def images(self, **body: Any) -> np.ndarray:
        answer = self.ask(POST, body, accept="application/x-npy")
        assert answer.status == 200, answer.body
        return np.load(io.BytesIO(answer.body))

    def metric(self, name: str) -> float:
        lines = self.ask("/metrics").body.decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_checkpoint(path: Path, autoencoder: Path, shift: float = 0.0) -> None:
    denoiser = busy_denoiser()
    with torch.no_grad():
        denoiser.out_proj.bias.add_(shift)
    content = checkpoint.diffusion_content(denoiser, denoiser, SCHEDULE, load_autoencoder(autoencoder), {"seed": 1})
    checkpoint.write(path, content)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, ae_file: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    runs = [folder / "checkpoints" / f"latent-diffusion-{name}" / "latest.pt" for name in ("broken", "other", "main")]
    runs[0].parent.mkdir(parents=True)
    runs[0].write_bytes(b"no checkpoint")
    write_checkpoint(runs[1], ae_file, shift=0.1)
    write_checkpoint(runs[2], ae_file)
    port, config = free_port(), folder / "config.json"
    arguments = {
        "outdir": str(folder),
        "token": TOKEN,
        "threads": 2,
        "max_images": MAX_IMAGES,
        "deadline_s": DEADLINE_S,
    }
    arguments |= {"ckpt": str(runs[2]), "max_body": 200_000}
    application = {"name": "images", "route_prefix": "/", "import_path": "serve.app:deployment", "args": arguments}
    config.write_text(json.dumps({"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
    log = folder / "log"
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(config)]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
    made = Server(port, runs[2], Generator.open(runs[2])[0])
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                if made.ask("/ready").status == 200:
                    break
            except OSError:
                pass
            time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield made
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


# --- the official client ---


def test_the_official_client_works_unchanged(server: Server) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=TOKEN, max_retries=0)
    made = client.images.generate(
        prompt="seven",
        n=3,
        size="28x28",
        response_format="b64_json",
        model="latent-diffusion-main",
        extra_body={"seed": 5},
    )
    wanted = server.generator([5, 6, 7], [7, 7, 7])[:, 0].numpy()
    for image, expected in zip(made.data, wanted, strict=True):
        np.testing.assert_array_equal(pixels(base64.b64decode(image.b64_json)), expected)
    assert next(model.id for model in client.models.list()) == "latent-diffusion-main"
    assert client.models.retrieve("latent-diffusion-main").owned_by == "ldm_ray"
    events = list(client.images.generate(prompt="3", stream=True, partial_images=3, extra_body={"seed": 1}))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    wanted = server.generator([1], [3])[0, 0].numpy()
    np.testing.assert_array_equal(pixels(base64.b64decode(events[-1].b64_json)), wanted)
    with pytest.raises(openai.BadRequestError, match="one digit"):
        client.images.generate(prompt="a horse")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="1", model="gpt-image-1")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


# --- same bytes ---


def test_same_bytes_in_random_company(server: Server) -> None:
    dice = random.Random(4)

    def one(_: int) -> tuple[dict[str, Any], np.ndarray]:
        count = dice.choice([1, 1, 2, 9])
        body = {"n": count, "seeds": [dice.randrange(2**32) for _ in range(count)]}
        body |= {"sampler": dice.choice(["dpmpp_2m", "ddim", "ddpm"]), "num_inference_steps": dice.choice([1, 8, 30])}
        body |= {
            "guidance_scale": dice.choice([1, 0, 2.5]),
            "class_label": [dice.choice([None, 3, 9]) for _ in range(count)],
        }
        return body, server.images(**body)

    with ThreadPoolExecutor(16) as pool:
        for body, made in pool.map(one, range(60)):
            names = ("sampler", "num_inference_steps", "guidance_scale")
            sampling = SamplingConfig(**{name: body[name] for name in names})
            wanted = server.generator(body["seeds"], body["class_label"], sampling)[:, 0].numpy()
            np.testing.assert_array_equal(made, wanted)


def test_seeds_and_labels(server: Server) -> None:
    drawn = server.ask(POST, {"n": 3}).json
    seeds = [item["seed"] for item in drawn["data"]]
    assert seeds == list(range(seeds[0], seeds[0] + 3)) and [item["label"] for item in drawn["data"]] == [None] * 3
    again = server.ask(POST, {"n": 3, "seed": seeds[0], "class_label": None, "prompt": "wins not"}).json
    assert again["data"] == drawn["data"]
    last = server.ask(POST, {"n": 2, "seed": 2**32 - 2, "prompt": "the digit Four"}).json
    assert [(item["seed"], item["label"]) for item in last["data"]] == [(2**32 - 2, 4), (2**32 - 1, 4)]


# --- formats ---


def test_formats_hold_the_same_images(server: Server) -> None:
    body = {"n": 6, "seed": 11, "class_label": [1, 2, 3, 4, 5, None], "size": "56x56"}
    wanted = server.generator(range(11, 17), body["class_label"])[:, 0].numpy()  # type: ignore[arg-type]
    large = wanted.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_array_equal(server.images(**body), large)
    told = server.ask(POST, body).json
    assert told["size"] == "56x56" and told["model"] == "latent-diffusion-main" and told["num_inference_steps"] == 8
    files = {}
    for item, expected in zip(told["data"], large, strict=True):
        data = base64.b64decode(item["b64_json"])
        np.testing.assert_array_equal(pixels(data), expected)
        assert item["sha256"] == hashlib.sha256(data).hexdigest()
        files[item["sha256"]] = data
    text = Image.open(io.BytesIO(data)).text
    assert (text["seed"], text["label"], text["sampler"], text["steps"]) == ("16", "none", "dpmpp_2m", "8")
    assert text["checkpoint"] == hashlib.sha256(server.ckpt.read_bytes()).hexdigest()

    sheet = server.ask(POST, body, accept="image/png, application/json;q=0.5")
    assert sheet.headers["content-type"] == "image/png" and pixels(sheet.body).shape == (2 * 92, 2 * 62)
    one = server.ask(POST, {"seed": 11, "class_label": 1}, accept="image/*")
    np.testing.assert_array_equal(pixels(one.body), wanted[0])

    animated = Image.open(io.BytesIO(server.ask(POST, body, accept="image/gif").body))
    assert animated.n_frames == 8 and animated.size == (2 * 62, 2 * 92)
    archive = zipfile.ZipFile(io.BytesIO(server.ask(POST, body, accept="application/zip").body))
    manifest = json.loads(archive.read("manifest.json"))
    assert [entry["seed"] for entry in manifest["images"]] == list(range(11, 17))
    for entry in manifest["images"]:
        assert archive.read(entry["file"]) == files[entry["sha256"]]


def test_a_permalink_fixes_its_bytes(server: Server) -> None:
    path = "/v1/images/latent-diffusion-main/7/42.png"
    first = server.ask(f"{path}?steps=5&guidance=2&sampler=ddim")
    assert first.status == 200 and first.headers["content-type"] == "image/png"
    assert first.headers["etag"] == f'"{hashlib.sha256(first.body).hexdigest()}"'
    assert "immutable" in first.headers["cache-control"] and "private" in first.headers["cache-control"]
    body = {"prompt": "7", "seed": 42, "num_inference_steps": 5, "guidance_scale": 2.0, "sampler": "ddim"}
    (item,) = server.ask(POST, body).json["data"]
    assert base64.b64decode(item["b64_json"]) == first.body
    for tag in (first.headers["etag"], f'"x", W/{first.headers["etag"]}', "*"):
        again = server.ask(f"{path}?steps=5&guidance=2&sampler=ddim", if_none_match=tag)
        assert again.status == 304 and again.body == b""
    assert server.ask(path, if_none_match=first.headers["etag"]).status == 200
    sampling = SamplingConfig()
    unconditional = server.ask("/v1/images/latent-diffusion-main/none/42.png")
    np.testing.assert_array_equal(pixels(unconditional.body), server.generator([42], [None], sampling)[0, 0].numpy())


def test_streaming_shows_every_image_and_ends_with_all(server: Server) -> None:
    answer = server.ask(POST, {"n": 5, "prompt": "2", "seed": 3, "stream": True, "partial_images": 2})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(block.split("data: ")[1]) for block in answer.body.decode().strip().split("\n\n")]
    partial = [event for event in events if event["type"].endswith("partial_image")]
    assert sorted((event["index"], event["partial_image_index"]) for event in partial) == [
        (i, k) for i in range(5) for k in range(2)
    ]
    completed = events[len(partial) :]
    assert [event["index"] for event in completed] == list(range(5))
    plain = server.ask(POST, {"n": 5, "prompt": "2", "seed": 3}).json["data"]
    assert [event["b64_json"] for event in completed] == [item["b64_json"] for item in plain]


# --- latent space ---


def test_latents(server: Server) -> None:
    numbers = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    answer = server.ask("/v1/latents/decode", {"latents": numbers.tolist()}, accept="application/x-npy")
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.body)), server.generator.decode(numbers)[:, 0].numpy())
    for method in ("linear", "spherical"):
        ends = {"start": {"seed": 1, "class_label": 3}, "end": {"seed": 2, "class_label": 8}, "n": 5, "method": method}
        answer = server.ask("/v1/images/interpolations", ends, accept="application/x-npy")
        path = np.load(io.BytesIO(answer.body)).astype(int)
        wanted = server.generator([1, 2], [3, 8])[:, 0].numpy().astype(int)
        assert path.shape == (5, 28, 28) and np.abs(path[[0, -1]] - wanted).max() <= 1
    found = server.ask("/v1/latents/map?n=40&seed=9").json
    origin, axes = np.array(found["origin"]), np.array(found["axes"])
    assert axes.shape == (2, 16) and len(found["points"]) == 40
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), atol=1e-9)
    point = found["points"][13]
    latent = server.generator.latents([point["seed"]], [point["label"]])[0].double().numpy()
    np.testing.assert_allclose(axes @ (latent - origin), [point["x"], point["y"]], atol=1e-5)


# --- models ---


def test_models(server: Server) -> None:
    found = server.ask("/v1/models").json["data"]
    assert found[0]["id"] == "latent-diffusion-main"
    assert {model["id"] for model in found} == {f"latent-diffusion-{name}" for name in ("main", "other", "broken")}
    told = server.ask("/v1/models/latent-diffusion-main").json
    assert told["autoencoder"] == "mlp" and told["latent_size"] == 16 and told["classes"] == 10 and told["default"]
    assert told["sha256"] == hashlib.sha256(server.ckpt.read_bytes()).hexdigest()
    assert told["defaults"]["num_inference_steps"]["ddpm"] == 1000
    other = Generator.open(server.ckpt.parents[1] / "latent-diffusion-other" / "latest.pt")[0]
    made = server.images(model="latent-diffusion-other", seed=1, prompt="1")
    np.testing.assert_array_equal(made, other([1], [1])[:, 0].numpy())
    broken = server.ask(POST, {"model": "latent-diffusion-broken", "prompt": "1"})
    assert broken.status == 503 and "does not load" in broken.error["message"]
    assert str(server.ckpt.parents[2]) not in broken.body.decode()
    assert server.ask("/v1/models/nothing").error["code"] == "model_not_found"


# --- what is refused ---

INVALID: list[tuple[dict[str, Any], str | None]] = [
    ({"n": 0}, "n"),
    ({"n": 257}, "n"),
    ({"n": -1}, "n"),
    ({"n": "2"}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": True}, "n"),
    ({"n": None}, "n"),
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
    ({"size": None}, "size"),
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
    ({"seed": 1.0}, "seed"),
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
    for latents in ([], [[]], [[1.0] * 15], [[1.0] * 17], [[float("nan")] * 16], [["1"] * 16], [[1e9] * 16], 7, None):
        assert server.ask("/v1/latents/decode", {"latents": latents}).error["type"] == "invalid_request_error"
    end = {"seed": 1}
    for body in ({"start": end}, {"start": end, "end": {"seed": -1}}, {"start": end, "end": end, "n": 1}):
        assert server.ask("/v1/images/interpolations", body).status == 400


def test_other_refusals(server: Server) -> None:
    for path in ("/v1/models", "/v1/images/latent-diffusion-main/7/1.png"):
        answer = server.ask(path, {}, method="DELETE")
        assert answer.status == 405 and answer.error and answer.headers["allow"]
    assert server.ask(POST).status == 405
    assert server.ask(POST, {"n": 1}, accept="text/html").status == 406
    assert server.ask(POST, {"n": 1}, accept="application/json;q=0").error["code"] == "not_acceptable"
    assert server.ask(POST, b"n=1", content_type="application/x-www-form-urlencoded").status == 415
    assert server.ask(POST, b"{}", content_type="text/plain").error["code"] == "unsupported_media_type"
    assert server.ask(POST, b'{"prompt": "' + b"7" * 250_000 + b'"}').error["code"] == "body_too_large"
    heavy = server.ask(
        POST, {"n": 256, "sampler": "ddpm", "guidance_scale": 3, "num_inference_steps": 1000, "prompt": "x"}
    )
    assert heavy.status == 400


def test_the_token_protects_everything_but_health(server: Server) -> None:
    for path in ("/health", "/ready"):
        assert server.ask(path, token=None).status == 200
    for path in ("/", "/v1/models", "/metrics", "/openapi.json", "/docs", "/static/app.js", "/v1/images/x/1/1.png"):
        for token in (None, "wrong"):
            answer = server.ask(path, token=token)
            assert answer.status == 401 and answer.error["code"] == "unauthorized", path
            assert answer.headers["www-authenticate"] == "Bearer"
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


# --- load ---


def quiet(server: Server) -> None:
    for _ in range(600):
        if server.metric("ldm_queue_work") == server.metric("ldm_images_live") == 0:
            return
        time.sleep(0.05)
    pytest.fail("the server still works on something")


def test_dropped_connections_stop_their_work(server: Server) -> None:
    quiet(server)
    before = server.metric("ldm_steps_total")
    count, body = 30, json.dumps({"n": 8, "sampler": "ddpm", "prompt": "1"}).encode()
    head = f"POST {POST} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer {TOKEN}\r\n"
    sockets = []
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        sockets.append(connection)
    while server.metric("ldm_images_live") == 0:
        time.sleep(0.01)
    for connection in sockets:
        connection.close()
    quiet(server)
    assert server.metric("ldm_steps_total") - before < count * 8 * 1000
    np.testing.assert_array_equal(server.images(seed=1, prompt="1"), server.generator([1], [1])[:, 0].numpy())


def test_overload_is_answered_by_200_and_429_alone(server: Server) -> None:
    def one(i: int) -> Answer:
        return server.ask(
            POST, {"n": 256, "seed": i, "prompt": "1", "num_inference_steps": 30}, accept="application/x-npy"
        )

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(one, range(80)))
    statuses = {answer.status for answer in answers}
    assert statuses <= {200, 429} and 200 in statuses and 429 in statuses, statuses
    for answer in answers:
        if answer.status == 429:
            assert answer.error["type"] == "rate_limit_error" and int(answer.headers["retry-after"]) >= 1
    quiet(server)
    assert server.images(seed=1, prompt="1").shape == (1, 28, 28)


def test_a_deadline_is_408_and_short_requests_pass(server: Server) -> None:
    heavy = {"n": 256, "sampler": "ddpm", "guidance_scale": 3.0, "prompt": "1"}
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(server.ask, POST, heavy) for _ in range(3)]
        while server.metric("ldm_images_live") == 0:
            time.sleep(0.01)
        short = server.ask(POST, {"prompt": "5"})
        assert short.status == 200 and not all(one.done() for one in waiting)
        statuses = [one.result().status for one in waiting]
    assert 408 in statuses and set(statuses) <= {200, 408}
    quiet(server)
