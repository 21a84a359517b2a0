"""The service as its clients see it: one real ``serve run``, its own ports, the official client library."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch
from PIL import Image

from ldm_ray.engine.generator import Generator
from ldm_ray.settings.sampling import SamplingConfig
from tests.helpers.service import POST, TOKEN, Server


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
        body |= {
            "sampler": dice.choice(["unipc", "dpmpp_2m_sde", "dpmpp_2m", "ddim", "ddpm"]),
            "num_inference_steps": dice.choice([1, 8, 30]),
        }
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
    again = server.ask(POST, {"n": 3, "seed": seeds[0], "class_label": None}).json
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
    assert told["size"] == "56x56" and told["model"] == "latent-diffusion-main" and told["num_inference_steps"] == 10
    files = {}
    for item, expected in zip(told["data"], large, strict=True):
        data = base64.b64decode(item["b64_json"])
        np.testing.assert_array_equal(pixels(data), expected)
        assert item["sha256"] == hashlib.sha256(data).hexdigest()
        files[item["sha256"]] = data
    opened: Any = Image.open(io.BytesIO(data))
    text = opened.text
    assert (text["seed"], text["label"], text["sampler"], text["steps"]) == ("16", "none", "dpmpp_2m_sde", "10")
    assert text["checkpoint"] == hashlib.sha256(server.ckpt.read_bytes()).hexdigest()

    sheet = server.ask(POST, body, accept="image/png, application/json;q=0.5")
    assert sheet.headers["content-type"] == "image/png" and pixels(sheet.body).shape == (2 * 92, 2 * 62)
    one = server.ask(POST, {"seed": 11, "class_label": 1}, accept="image/*")
    np.testing.assert_array_equal(pixels(one.body), wanted[0])

    animated: Any = Image.open(io.BytesIO(server.ask(POST, body, accept="image/gif").body))
    assert animated.n_frames == 10 and animated.size == (2 * 62, 2 * 92)
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
    assert {model["id"] for model in found} == {
        *(f"latent-diffusion-{name}" for name in ("main", "other", "broken")),
        "pixel-diffusion-small",
    }
    told = server.ask("/v1/models/latent-diffusion-main").json
    assert told["autoencoder"] == "mlp" and told["latent_size"] == 16 and told["classes"] == 10 and told["default"]
    assert told["sha256"] == hashlib.sha256(server.ckpt.read_bytes()).hexdigest()
    assert told["defaults"]["num_inference_steps"]["ddpm"] == 1000
    other = Generator.open(server.ckpt.parents[1] / "latent-diffusion-other" / "latest.pt")
    made = server.images(model="latent-diffusion-other", seed=1, prompt="1")
    np.testing.assert_array_equal(made, other([1], [1])[:, 0].numpy())
    pixels = Generator.open(server.ckpt.parents[1] / "pixel-diffusion-small" / "latest.pt")
    made = server.images(model="pixel-diffusion-small", seed=1, n=3, prompt="1", num_inference_steps=3)
    wanted = pixels([1, 2, 3], [1] * 3, SamplingConfig(num_inference_steps=3))
    np.testing.assert_array_equal(made, wanted[:, 0].numpy())
    told = server.ask("/v1/models/pixel-diffusion-small").json
    assert (told["space"], told["autoencoder"], told["latent_size"]) == ("pixel", None, 784)
    broken = server.ask(POST, {"model": "latent-diffusion-broken", "prompt": "1"})
    assert broken.status == 503 and "does not load" in broken.error["message"]
    assert str(server.ckpt.parents[2]) not in broken.body.decode()
    assert server.ask("/v1/models/nothing").error["code"] == "model_not_found"


# --- the page ---


async def page_when(chromium: str, address: str, folder: Path, pattern: str) -> str:
    """The page's HTML as soon as the pattern is in it, in real time, by Chromium's DevTools protocol."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --disable-background-networking --no-first-run"
    flags += f" --disable-component-update --disable-sync --user-data-dir={folder} --window-size=390,1500"
    flags += " --remote-debugging-port=0"
    browser = subprocess.Popen([chromium, *flags.split(), address], stderr=subprocess.DEVNULL)
    try:
        active, html, number = folder / "DevToolsActivePort", "", 0
        async with aiohttp.ClientSession() as session:
            while not (active.exists() and active.read_text().count("\n")):
                assert browser.poll() is None, "Chromium ended"
                await asyncio.sleep(0.05)
            port = active.read_text().split()[0]
            found: list[str] = []
            while not found:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    found = [each["webSocketDebuggerUrl"] for each in await answer.json() if each["type"] == "page"]
            async with session.ws_connect(found[0], max_msg_size=0) as devtools:
                while not re.search(pattern, html):
                    number += 1
                    expression = {"expression": "document.documentElement.outerHTML"}
                    await devtools.send_json({"id": number, "method": "Runtime.evaluate", "params": expression})
                    while (told := await devtools.receive_json()).get("id") != number:
                        pass
                    html = told["result"]["result"].get("value", "")
                    await asyncio.sleep(0.1)
        return html
    finally:
        browser.kill()
        browser.wait()


@pytest.mark.browser
def test_the_page_makes_digits_in_a_browser(server: Server, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    address = f"http://me:{TOKEN}@127.0.0.1:{server.port}/"
    seen = page_when(chromium, address, tmp_path, r'id="status"[^>]*>16 images in')
    page = asyncio.run(asyncio.wait_for(seen, 90))
    images = re.findall(r'<img [^>]*src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 16, page[-2000:]
    wanted = server.generator(range(42, 58), [7] * 16)[:, 0].numpy()
    for data, expected in zip(images, wanted, strict=True):
        np.testing.assert_array_equal(pixels(base64.b64decode(data)), expected)
