"""Answers a file of requests: ``{"custom_id": …, "body": {"prompt": "seven", "n": 4, "seed": 5}}`` a line.

The body is that of ``POST /v1/images/generations``, and so are the images. An answer is a line of the output with
the same ``custom_id``, in the order of the requests; a request that cannot be answered gets a line in the file of
errors instead.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from ldm_ray.checkpoints.checkpoint import DiffusionCheckpoint
from ldm_ray.dataset.shards import BATCH
from ldm_ray.devices.device import pick_device
from ldm_ray.diffusion.samplers import Plan, plan_of
from ldm_ray.engine.generator import DEFAULT, Generator
from ldm_ray.engine.items import Made, item, parameters, parameters_of_one
from ldm_ray.engine.schema import (
    MAX_IMAGES,
    GenerationRequest,
    Refused,
    checked_labels,
    labels_of,
    refusal,
    sampling_of,
    scale_of,
    seeds_of,
)
from ldm_ray.files.paths import replaced
from ldm_ray.settings.datasets import GenerateConfig
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.limits import MAX_SEED, SIDE
from ldm_ray.settings.sampling import SamplingConfig
from ldm_ray.terminal.cli import check_place
from ldm_ray.terminal.progress import Progress
from ldm_ray.terminal.words import counted

LONGEST = 1 << 20  # characters of a line
log = logging.getLogger(__name__)


@dataclass
class Wish:
    """One request; ``error`` when it is refused."""

    line: int
    custom_id: str | None = None
    seeds: Sequence[int] = ()
    labels: Sequence[int | None] = ()
    sampling: SamplingConfig = DEFAULT
    scale: int = 1
    error: Refused | None = None
    data: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Model:
    """The checkpoint that answers. default: the settings of requests that leave them out."""

    name: str
    generator: Generator
    only_digit: int | None
    default: SamplingConfig

    def plan(self, sampling: SamplingConfig) -> Plan:
        """ConfigError: more steps than the model has timesteps."""
        return plan_of(self.generator.schedule, sampling, self.generator.prediction_type)


def answer_file(source: Path, output: Path, name: str, loaded: DiffusionCheckpoint, config: GenerateConfig) -> int:
    """Writes ``output`` and, where there are any, its errors; both appear when all are answered. Returns 1 where
    one was refused, else 0. name: the model's, as the service calls it."""
    errors = output.with_name(f"{output.stem}.errors{output.suffix or '.jsonl'}")
    if os.path.realpath(source) in map(os.path.realpath, (output, errors)) or output.is_dir():
        raise ConfigError(f"--output {output} must be another file than --requests {source}")
    check_place(output)
    generator = Generator.of(loaded, pick_device(config.device))
    model = Model(name, generator, loaded.info.get("args", {}).get("only_digit"), config.sampling)
    most = config.batch_size or BATCH[generator.device.type]
    answered = refused = images = 0
    progress = Progress("answering requests")
    with source.open("rb") as lines, replaced(output) as good, replaced(errors) as bad, progress:
        for batch in batches(read(lines, model), most):
            answer(batch, model)
            for wish in batch:
                if wish.error is None:
                    fingerprint = generator.fingerprint_in(wish.sampling.precision)
                    body = {"data": wish.data, "checkpoint": generator.sha256, "fingerprint": fingerprint}
                    write(good, wish, {"status_code": 200, "body": body}, None)
                    answered, images = answered + 1, images + len(wish.seeds)
                else:
                    refused += 1
                    write(bad, wish, None, wish.error.body() | {"line": wish.line})
    if not refused:
        errors.unlink()
    print(f"{counted(answered, 'request')} answered with {counted(images, 'image')} in {output}")
    if refused:
        print(f"{refused:,} of {counted(answered + refused, 'request')} refused, each with its reason in {errors}")
    return 1 if refused else 0


def write(stream: IO[bytes], wish: Wish, response: dict[str, Any] | None, error: dict[str, Any] | None) -> None:
    line = json.dumps({"custom_id": wish.custom_id, "response": response, "error": error})
    stream.write(line.encode() + b"\n")


def read(lines: IO[bytes], model: Model) -> Iterator[Wish]:
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
            read_wish(line, wish, model)
            key = digest_of(wish.custom_id or "")[:16]
            if key in seen:
                raise Refused(f"custom_id {wish.custom_id!r:.100} was there before", "custom_id")
            seen.add(key)
        except Refused as error:
            wish.error = error
        yield wish


def read_wish(line: bytes, wish: Wish, model: Model) -> None:
    """Fills the wish in from its line. Refused when it cannot be."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Refused(f"line {wish.line} is not JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("custom_id"), str) or not fields["custom_id"]:
        raise Refused(f"line {wish.line} has no custom_id, a text that is not empty", "custom_id")
    wish.custom_id = fields["custom_id"]
    try:
        request = GenerationRequest.model_validate(fields.get("body"))
    except ValidationError as error:
        first = error.errors()[0]
        raise refusal(first, first["loc"]) from None
    if request.stream:
        raise Refused("stream: a file of requests has no streams; leave stream and partial_images out", "stream")
    if request.model not in (None, model.name):
        message = f"model: {request.model!r} is not the checkpoint of this command, {model.name!r}: name it by --ckpt"
        raise Refused(message, "model", "model_not_found")
    generator = model.generator
    labels = labels_of(request, generator.class_names)
    wish.labels = checked_labels(labels, generator.num_classes, model.only_digit, model.name)
    wish.seeds = seeds_of(request, first_seed(wish.custom_id))
    wish.sampling = sampling_of(request, model.plan, model.default)
    wish.scale = scale_of(request.size)
    if wish.scale != 1 and generator.codec.image_size != (SIDE, SIDE):
        raise Refused("size: the model makes images of {}x{} alone".format(*generator.codec.image_size), "size")


def first_seed(custom_id: str) -> int:
    """What a request without a seed has."""
    return int.from_bytes(digest_of(custom_id)[:4], "big") % (MAX_SEED - MAX_IMAGES)


def digest_of(custom_id: str) -> bytes:
    return hashlib.sha256(custom_id.encode(errors="surrogatepass")).digest()


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


def answer(batch: list[Wish], model: Model) -> None:
    """Fills in ``data``; requests of the same settings are computed together."""
    groups: dict[SamplingConfig, list[Wish]] = {}
    for wish in batch:
        if wish.error is None:
            groups.setdefault(wish.sampling, []).append(wish)
    generator = model.generator
    for sampling, wishes in groups.items():
        seeds = [seed for wish in wishes for seed in wish.seeds]
        labels = [label for wish in wishes for label in wish.labels]
        images, finite = generator.make(seeds, labels, sampling)
        fingerprint = generator.fingerprint_in(sampling.precision)
        text = parameters(model.name, generator.sha256, fingerprint, sampling, len(model.plan(sampling)))
        pictures, start = zip(images[:, 0].numpy(), seeds, labels, strict=True), 0
        for wish in wishes:
            count = len(wish.seeds)
            own = list(islice(pictures, count))
            if bool(finite[start : start + count].all()):
                wish.data = [item(Made(*each, parameters_of_one(text, *each[1:])), wish.scale) for each in own]
            else:
                message = "the model gave numbers that are not finite: its weights are unusable"
                wish.error = Refused(message, code="not_finite")
            start += count
