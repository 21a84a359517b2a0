"""A body means the same over HTTP and as a line of a file: the same images and bytes, or the same refusal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ldm_ray import generate
from tests.helpers.asgi import POST, InProcess, in_process
from tests.helpers.checkpoints import write_small_checkpoint

ACCEPTED: list[dict[str, Any]] = [
    {"prompt": "7"},
    {"prompt": "a picture of a seven"},
    {"prompt": "The number 3, handwritten"},
    {"class_label": 7, "n": 3},
    {"class_label": [1, None, 3], "n": 3, "seed": None, "seeds": [9, 4, 9]},
    {"class_label": 2, "prompt": "seven"},
    {"class_label": None, "prompt": "seven"},
    {},
    {"class_label": 8.0, "n": 2.0, "seed": 5.0, "num_inference_steps": 3.0, "partial_images": 0},
    {"prompt": "0", "sampler": "ddim", "num_inference_steps": 4, "guidance_scale": 1},
    {"prompt": "0", "sampler": "ddim", "eta": 0.5, "timestep_spacing": "leading", "guidance_start": 0},
    {"prompt": "0", "eta": 0},
    {"prompt": "1", "size": "56x56"},
    {"prompt": "1", "size": "auto", "model": "small", "response_format": "b64_json", "output_format": "png"},
    {"prompt": "1", "quality": "standard", "background": "opaque", "moderation": "low", "user": "me", "stream": False},
]
REFUSED: list[tuple[Any, str | None, str]] = [
    (None, None, "invalid_value"),
    ([], None, "invalid_value"),
    ("7", None, "invalid_value"),
    ({"prompt": "a cat"}, "prompt", "invalid_value"),
    ({"prompt": "7 and 8"}, "prompt", "invalid_value"),
    ({"prompt": "x" * 1001}, "prompt", "invalid_value"),
    ({"prompt": 7}, "prompt", "invalid_value"),
    ({"class_label": 10}, "class_label", "invalid_value"),
    ({"class_label": -1}, "class_label", "invalid_value"),
    ({"class_label": [1, 2], "n": 3}, None, "invalid_value"),
    ({"class_label": [1, "two"], "n": 2}, "class_label", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 257}, "n", "invalid_value"),
    ({"n": True}, "n", "invalid_value"),
    ({"n": "1"}, "n", "invalid_value"),
    ({"seed": 2**32}, "seed", "invalid_value"),
    ({"seed": 2**32 - 1, "n": 2}, None, "invalid_value"),
    ({"seed": 1, "seeds": [1]}, None, "invalid_value"),
    ({"seeds": [1, 2]}, None, "invalid_value"),
    ({"seeds": []}, "seeds", "invalid_value"),
    ({"num_inference_steps": 0}, "num_inference_steps", "invalid_value"),
    ({"num_inference_steps": 1001}, "num_inference_steps", "invalid_value"),
    ({"guidance_scale": 21}, "guidance_scale", "invalid_value"),
    ({"guidance_scale": float("nan")}, "guidance_scale", "invalid_value"),
    ({"guidance_start": 1}, "guidance_start", "invalid_value"),
    ({"sampler": "euler"}, "sampler", "invalid_value"),
    ({"timestep_spacing": "even"}, "timestep_spacing", "invalid_value"),
    ({"eta": 1.5, "sampler": "ddim"}, "eta", "invalid_value"),
    ({"eta": 0.5}, "eta", "invalid_value"),
    ({"size": "30x30"}, "size", "invalid_value"),
    ({"response_format": "url"}, "response_format", "invalid_value"),
    ({"output_format": "webp"}, "output_format", "invalid_value"),
    ({"partial_images": 2}, None, "invalid_value"),
    ({"colour": "red"}, "colour", "unknown_parameter"),
    ({"k" * 300: 1}, "k" * 98 + " …", "unknown_parameter"),
]


@pytest.fixture(scope="module")
def threes(tmp_path_factory: pytest.TempPathFactory, ae_file: Path) -> Iterator[InProcess]:
    """A service of a model that was trained on threes alone."""
    path = write_small_checkpoint(tmp_path_factory.mktemp("served") / "threes.pt", ae_file, only_digit=3)
    with in_process(path) as running:
        yield running


def in_a_file(ckpt: Path, folder: Path, bodies: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What becomes of lines with these bodies, by number: (bodies of the answers, errors)."""
    source = folder / "in.jsonl"
    lines = [{"custom_id": str(i), "url": POST, "method": "POST", "body": body} for i, body in enumerate(bodies)]
    source.write_text("\n".join(map(json.dumps, lines)))
    output, errors = folder / "out.jsonl", folder / "out.errors.jsonl"
    errors.unlink(missing_ok=True)
    code = generate.main(["--ckpt", str(ckpt), "--requests", str(source), "--output", str(output), "--device", "cpu"])
    assert code == int(errors.exists())
    answers = {line["custom_id"]: line["response"]["body"] for line in map(json.loads, output.open())}
    refused = map(json.loads, errors.open()) if errors.exists() else ()
    return answers, {line["custom_id"]: line["error"] for line in refused}


def test_what_http_accepts_is_the_same_images_in_a_file(ckpt: Path, small: InProcess, tmp_path: Path) -> None:
    bodies = [body if "seed" in body or "seeds" in body else body | {"seed": 40 + i} for i, body in enumerate(ACCEPTED)]
    answers, errors = in_a_file(ckpt, tmp_path, bodies)
    assert not errors
    for i, body in enumerate(bodies):
        answer = small.ask(POST, body)
        assert answer.status == 200, (body, answer.body)
        assert answers[str(i)]["data"] == answer.json["data"], body
        assert answers[str(i)]["fingerprint"] == answer.json["fingerprint"]


def test_what_http_refuses_is_refused_in_a_file_in_the_same_words(ckpt: Path, small: InProcess, tmp_path: Path) -> None:
    answers, errors = in_a_file(ckpt, tmp_path, [body for body, _, _ in REFUSED])
    assert not answers
    for i, (body, param, code) in enumerate(REFUSED):
        answer = small.ask(POST, json.dumps(body).encode())
        error = errors[str(i)]
        assert error.pop("line") == i + 1
        assert answer.status == 400 and error == answer.error, body
        assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error"), body
        assert "\n" not in error["message"] and "--" not in error["message"]


def test_a_model_of_one_digit(threes: InProcess, tmp_path: Path) -> None:
    ckpt = threes.service.library.default.path
    bodies = [{"seed": 1}, {"class_label": [3, None], "n": 2, "seed": 1}, {"prompt": "four", "seed": 1}]
    answers, errors = in_a_file(Path(str(ckpt)), tmp_path, bodies)
    for i, body in enumerate(bodies[:2]):
        assert answers[str(i)]["data"] == threes.ask(POST, body).json["data"]
        assert {image["label"] for image in answers[str(i)]["data"]} == {3}
    assert errors["2"] == threes.ask(POST, bodies[2]).error | {"line": 3}


def test_what_only_a_server_can_do_is_refused_in_a_file(ckpt: Path, tmp_path: Path) -> None:
    bodies = [{"prompt": "7", "stream": True}, {"stream": True, "partial_images": 2}, {"model": "other"}]
    answers, errors = in_a_file(ckpt, tmp_path, bodies)
    assert not answers
    assert [errors[str(i)]["param"] for i in range(3)] == ["stream", "stream", "model"]
    assert "leave stream" in errors["0"]["message"] and errors["2"]["code"] == "model_not_found"
    assert "'other'" in errors["2"]["message"] and "'small'" in errors["2"]["message"]


def test_a_line_without_a_seed_has_the_same_one_every_time(ckpt: Path, tmp_path: Path) -> None:
    """It follows from the custom_id, even from one that is no text of Unicode."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"custom_id": "a", "body": {"n": 2}}\n{"custom_id": "\\ud800", "body": {}}\n')
    flags = ["--ckpt", str(ckpt), "--requests", str(source), "--output", str(output), "--device", "cpu"]
    assert generate.main(flags) == 0
    first, second = (json.loads(line)["response"]["body"]["data"] for line in output.open())
    assert [image["seed"] for image in first] == [3398926610, 3398926611] and len(second) == 1
