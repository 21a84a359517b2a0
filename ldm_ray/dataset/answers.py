"""Answers a file of requests: ``{"custom_id": …, "body": {"class_label": 7, "n": 4, "seed": 5}}`` a line.

The body is that of ``POST /v1/images/generations``. An answer is a line of the output with the same ``custom_id``,
in the order of the requests; a request that cannot be answered gets a line in the file of errors instead.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ldm_ray.checkpoints.checkpoint import DiffusionCheckpoint
from ldm_ray.data.classes import class_of, listing, numbered
from ldm_ray.data.images import encode_pngs
from ldm_ray.dataset.shards import BATCH
from ldm_ray.devices.device import pick_device
from ldm_ray.diffusion.samplers import plan_of
from ldm_ray.engine.generator import DEFAULT, Generator
from ldm_ray.files.paths import replaced
from ldm_ray.settings.datasets import GenerateConfig
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.limits import MAX_SEED
from ldm_ray.settings.sampling import SamplingConfig
from ldm_ray.terminal.cli import check_place
from ldm_ray.terminal.progress import Progress
from ldm_ray.terminal.words import counted

SAMPLING = ("sampler", "num_inference_steps", "timestep_spacing", "eta", "guidance_scale", "guidance_start")
FIELDS = {"class_label", "prompt", "n", "seed", "seeds", "model", "response_format", *SAMPLING}
MOST = 256  # images of a request
LONGEST = 1 << 20  # characters of a line
log = logging.getLogger(__name__)


class Refused(ValueError):
    """A request that cannot be answered; param: the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass
class Wish:
    """One request; ``error`` when it is refused."""

    line: int
    custom_id: str | None = None
    seeds: tuple[int, ...] = ()
    labels: tuple[int | None, ...] = ()
    sampling: SamplingConfig = DEFAULT
    error: Refused | None = None
    data: list[dict[str, Any]] | None = None


def answer_file(source: Path, output: Path, model: DiffusionCheckpoint, config: GenerateConfig) -> int:
    """Writes ``output`` and, where there are any, its errors; both appear when all are answered. Returns 1 where
    one was refused, else 0."""
    errors = output.with_name(f"{output.stem}.errors{output.suffix or '.jsonl'}")
    if os.path.realpath(source) in map(os.path.realpath, (output, errors)) or output.is_dir():
        raise ConfigError(f"--output {output} is to be another file than --requests {source}")
    check_place(output)
    generator = Generator.of(model, pick_device(config.device))
    most = config.batch_size or BATCH[generator.device.type]
    answered = refused = images = 0
    shown = Progress("answering requests")
    with source.open("rb") as lines, replaced(output) as good, replaced(errors) as bad, shown:
        for batch in batches(read(lines, generator, model, config.sampling), most):
            answer(batch, generator)
            for wish in batch:
                if wish.error is None:
                    fingerprint = generator.fingerprint_in(wish.sampling.precision)
                    body = {"data": wish.data, "checkpoint": generator.sha256, "fingerprint": fingerprint}
                    write(good, wish, {"status_code": 200, "body": body}, None)
                    answered, images = answered + 1, images + len(wish.seeds)
                else:
                    refused += 1
                    told = {"message": str(wish.error), "type": "invalid_request_error", "param": wish.error.param}
                    write(bad, wish, None, told | {"line": wish.line})
    if not refused:
        errors.unlink()
    print(f"{counted(answered, 'request')} answered with {counted(images, 'image')} in {output}")
    if refused:
        print(f"{refused:,} of {counted(answered + refused, 'request')} refused, each with its reason in {errors}")
    return 1 if refused else 0


def write(stream: IO[bytes], wish: Wish, response: dict[str, Any] | None, error: dict[str, Any] | None) -> None:
    line = json.dumps({"custom_id": wish.custom_id, "response": response, "error": error})
    stream.write(line.encode() + b"\n")


def read(lines: IO[bytes], generator: Generator, model: DiffusionCheckpoint, default: SamplingConfig) -> Iterator[Wish]:
    """A wish for each line that is not blank."""
    seen: set[bytes] = set()
    number = 0
    while line := lines.readline(LONGEST + 1):
        number += 1
        wish = Wish(line=number)
        try:
            if len(line) > LONGEST:
                while line and not line.endswith(b"\n"):
                    line = lines.readline(LONGEST + 1)
                raise Refused(f"line {number} is longer than {LONGEST} characters")
            if not line.strip():
                continue
            read_wish(line, wish, generator, model, default)
            key = hashlib.sha256(str(wish.custom_id).encode()).digest()[:16]
            if key in seen:
                raise Refused(f"custom_id {wish.custom_id!r:.100} was there before", "custom_id")
            seen.add(key)
        except Refused as error:
            wish.error = error
        yield wish


def read_wish(
    line: bytes, wish: Wish, generator: Generator, model: DiffusionCheckpoint, default: SamplingConfig
) -> None:
    """Fills the wish in from its line. Refused when it cannot be."""
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Refused(f"line {wish.line} is not JSON: {error}") from None
    if not isinstance(given, dict) or not isinstance(given.get("custom_id"), str) or not given["custom_id"]:
        raise Refused(f"line {wish.line} has no custom_id, a text that is not empty", "custom_id")
    wish.custom_id, body = given["custom_id"], given.get("body")
    if not isinstance(body, dict):
        raise Refused('a request has a "body", an object such as {"class_label": 7, "n": 1, "seed": 5}', "body")
    for key in body.keys() - FIELDS:
        raise Refused(f"unknown field {key!r:.60}; known are {', '.join(sorted(FIELDS))}", str(key)[:60])
    if body.get("response_format", "b64_json") != "b64_json":
        raise Refused("response_format is b64_json here", "response_format")
    count = whole(body.get("n", 1), "n", 1, MOST)
    wish.labels = labels_of(body, count, generator.class_names)
    wish.seeds = seeds_of(body, count, wish.custom_id)
    try:
        chosen = {key: body[key] for key in SAMPLING if body.get(key) is not None}
        wish.sampling = SamplingConfig(**{**default.to_dict(), **chosen}) if chosen else default
        plan_of(model.schedule, wish.sampling, model.prediction_type)
    except ConfigError as error:
        raise Refused(str(error).replace("--", "")) from None


def labels_of(body: dict[str, Any], count: int, names: Sequence[str]) -> tuple[int | None, ...]:
    """class_label (a label, a list of n, or null: unconditional) wins over prompt ("7", "seven")."""
    if "class_label" in body:
        label = body["class_label"]
        if isinstance(label, list) and len(label) != count:
            raise Refused(f"class_label lists {len(label)} labels for n = {count}", "class_label")
        each = label if isinstance(label, list) else [label] * count
        return tuple(None if one is None else whole(one, "class_label", 0, len(names) - 1) for one in each)
    prompt = body.get("prompt")
    try:
        return (class_of(prompt if isinstance(prompt, str) else "", names),) * count
    except ConfigError:
        classes = 'a digit, such as 7 or "seven"' if tuple(names) == numbered(10) else f"a class: {listing(names)}"
        raise Refused(f"class_label or prompt names {classes}; given was {prompt!r:.60}", "prompt") from None


def seeds_of(body: dict[str, Any], count: int, custom_id: str) -> tuple[int, ...]:
    """seeds (n of them), or seed + i for image i; without either they follow from the custom_id."""
    if body.get("seeds") is not None:
        seeds = body["seeds"]
        if not isinstance(seeds, list) or len(seeds) != count:
            raise Refused(f"seeds is a list of n = {count} seeds", "seeds")
        return tuple(whole(seed, "seeds", 0, MAX_SEED) for seed in seeds)
    if body.get("seed") is None:
        digest = hashlib.sha256(custom_id.encode()).digest()
        first = int.from_bytes(digest[:4], "big") % (MAX_SEED - MOST)
    else:
        first = whole(body["seed"], "seed", 0, MAX_SEED - count + 1)
    return tuple(range(first, first + count))


def whole(value: Any, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Refused(f"{name} is a whole number from {low} to {high}, not {value!r:.60}", name)
    return value


def batches(wishes: Iterator[Wish], most: int) -> Iterator[list[Wish]]:
    """Requests of about ``most`` images together."""
    batch: list[Wish] = []
    size = 0
    for wish in wishes:
        batch.append(wish)
        size += max(1, len(wish.seeds))
        if size >= most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def answer(batch: list[Wish], generator: Generator) -> None:
    """Fills in ``data``; requests of the same settings are computed together."""
    groups: dict[SamplingConfig, list[Wish]] = {}
    for wish in batch:
        if wish.error is None:
            groups.setdefault(wish.sampling, []).append(wish)
    for sampling, wishes in groups.items():
        seeds = [seed for wish in wishes for seed in wish.seeds]
        labels = [label for wish in wishes for label in wish.labels]
        images, finite = generator.make(seeds, labels, sampling)
        pngs, start = encode_pngs(images[:, 0].numpy()), 0
        for wish in wishes:
            rows = slice(start, start + len(wish.seeds))
            start = rows.stop
            if not bool(torch.all(finite[rows])):
                wish.error = Refused("the model gave numbers that are not finite: its weights are unusable")
                continue
            wish.data = [
                {
                    "b64_json": base64.b64encode(png).decode(),
                    "seed": seed,
                    "label": label,
                    "sha256": hashlib.sha256(png).hexdigest(),
                }
                for png, seed, label in zip(pngs[rows], wish.seeds, wish.labels, strict=True)
            ]
