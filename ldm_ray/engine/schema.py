"""A request for images, over HTTP or as a line of a file: its schema, and the seeds, labels and settings it means."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ldm_ray.data.classes import class_in
from ldm_ray.engine.generator import DEFAULT
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.limits import MAX_CLASSES, MAX_GUIDANCE, MAX_SEED, MAX_STEPS, SIDE
from ldm_ray.settings.sampling import SAMPLERS, SPACINGS, SamplingConfig

MAX_IMAGES = 256
MAX_SCALE = 16
EXAMPLE = '{"prompt": "7"}'
MESSAGE, PARAM = 400, 100  # characters: what a client sent is repeated to it, but not at any length
BRANCHES = ("function-", "list[", "constrained-")  # what pydantic calls the alternatives of a field
CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_parameter"}
SETTINGS = {
    "sampler", "num_inference_steps", "timestep_spacing", "eta", "guidance_scale", "guidance_start"
}  # fmt: skip


class Refused(ValueError):
    """A request that cannot be answered. param: the field; code: the reason in a word."""

    kind = "invalid_request_error"

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code

    def body(self) -> dict[str, Any]:
        """As clients see it."""
        param = None if self.param is None else cut(self.param, PARAM)
        return {"message": cut(self.message, MESSAGE), "type": self.kind, "param": param, "code": self.code}


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 2]} …"


def refusal(error: Mapping[str, Any], where: Sequence[int | str]) -> Refused:
    """What pydantic says of a field, in our words. where: the way to the field."""
    names = [str(part) for part in where]
    names = [name for i, name in enumerate(names) if not i or not name.startswith(BRANCHES)]
    param, kind, message = ".".join(names) or None, error["type"], error["msg"].removeprefix("Value error, ")
    if not names and (kind == "missing" or kind.endswith("_type")):
        message = f"the body must be a JSON object, such as {EXAMPLE}"
    return Refused(f"{param}: {message}" if param else message, param, CODES.get(kind, "invalid_value"))


def whole(value: Any) -> Any:
    """8.0 is an integer to JSON Schema."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(whole)
Seed = Annotated[int, Field(strict=True, ge=0, le=MAX_SEED), Whole]
Label = Annotated[int, Field(strict=True, ge=0, le=MAX_CLASSES - 1), Whole]
Steps = Annotated[int, Field(strict=True, ge=1, le=MAX_STEPS), Whole]
Partial = Annotated[int, Field(strict=True, ge=0, le=16), Whole]
Each = Field(min_length=1, max_length=MAX_IMAGES, fail_fast=True)


class Strict(BaseModel):
    """Unknown fields are refused; null, or nothing in a query, is a field left out."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        unknown = [name for name in value if name not in cls.model_fields][1:]  # one is enough for an error
        dropped = {*unknown, *(name for name, each in value.items() if each is None and name in cls.model_fields)}
        return {name: each for name, each in value.items() if name not in dropped}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> Any:
        schema = handler(core_schema)
        resolved = handler.resolve_ref_schema(schema)
        for name, each in resolved.get("properties", {}).items():
            nullable = {"type": "null"} in each.get("anyOf", ())
            if name not in resolved.get("required", ()) and not nullable:
                kept = {key: each.pop(key) for key in ("title", "description", "default", "examples") if key in each}
                resolved["properties"][name] = {"anyOf": [each, {"type": "null"}]} | kept
        return schema


class Output(Strict):
    """Which model makes images, and how they are given. Beside it, what OpenAI's clients may ask for and is done."""

    model: str | None = Field(None, max_length=200, description="one of /v1/models [the served one]")
    size: str = Field("28x28", description="28x28 times a whole number up to 16 (448x448); auto", examples=["28x28"])
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    output_compression: Annotated[Literal[100], Whole] = Field(100, description="PNG loses nothing")
    quality: Literal["auto", "standard"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = "auto"
    user: str | None = Field(None, max_length=1000, description="changes nothing")

    @field_validator("size")
    @classmethod
    def check_size(cls, size: str) -> str:
        scale_of(size)
        return size


class Sampling(Output):
    """How images are made; what is left out is the model's default."""

    num_inference_steps: Steps | None = Field(None, examples=[8])
    sampler: Literal[SAMPLERS] | None = Field(None, examples=["dpmpp_2m_sde"])  # type: ignore[valid-type]
    guidance_scale: float | None = Field(None, strict=True, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False, examples=[2.75])
    guidance_start: float | None = Field(
        None, strict=True, ge=0, lt=1, allow_inf_nan=False, description="share of the steps before guidance sets in"
    )
    timestep_spacing: Literal[SPACINGS] | None = None  # type: ignore[valid-type]
    eta: float | None = Field(
        None, strict=True, ge=0, le=1, allow_inf_nan=False, description="ddim's noise; other samplers have none"
    )


class GenerationRequest(Sampling):
    """POST /v1/images/generations"""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"prompt": "seven", "n": 4, "seed": 42}})

    prompt: str | None = Field(
        None,
        max_length=1000,
        description='a digit, "7" or "seven"; or the name of a class',
        examples=["seven"],
    )
    class_label: Label | Annotated[list[Label | None], Each] | None = Field(
        None,
        description="a digit (or class number), or one for each image, where null is unconditional; wins over prompt; "
        "without both, images are unconditional",
        examples=[7],
    )
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_IMAGES), Whole] = 1
    seed: Seed | None = Field(None, description="image i has seed + i [drawn, and returned]", examples=[42])
    seeds: Annotated[list[Seed], Each] | None = Field(None, description="one for each image")
    stream: bool = Field(False, strict=True, description="server-sent events")
    partial_images: Partial | None = Field(None, description="of each image, while it is denoised")

    @model_validator(mode="after")
    def check_together(self) -> GenerationRequest:
        if self.seed is not None and self.seeds is not None:
            raise ValueError("give seed or seeds, not both")
        if self.seeds is not None and len(self.seeds) != self.n:
            raise ValueError(f"{len(self.seeds)} seeds for n = {self.n}: one for each image")
        if isinstance(self.class_label, list) and len(self.class_label) != self.n:
            raise ValueError(f"{len(self.class_label)} class labels for n = {self.n}: one for each image")
        if self.seed is not None and self.seed + self.n - 1 > MAX_SEED:
            raise ValueError(f"seed {self.seed} with n = {self.n} goes beyond the last seed, {MAX_SEED}")
        if self.partial_images and not self.stream:
            raise ValueError("partial_images needs stream = true")
        return self


def scale_of(size: str) -> int:
    """The whole number that ``28x28`` is multiplied by, 1 for ``auto``. ValueError on anything else."""
    if size == "auto":
        return 1
    match = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", size)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if width != height or width % SIDE or not 1 <= width // SIDE <= MAX_SCALE:
        raise ValueError(f"a size is 28x28 times a whole number up to {MAX_SCALE}: 28x28, 56x56, … 448x448")
    return width // SIDE


def seeds_of(request: GenerationRequest, first: int) -> Sequence[int]:
    """One for each image; from ``first`` on where the request has none."""
    if request.seeds is not None:
        return request.seeds
    first = first if request.seed is None else request.seed
    return list(range(first, first + request.n))


def labels_of(request: GenerationRequest, names: Sequence[str]) -> Sequence[int | None]:
    """One for each image, not yet checked against the model's classes, whose names these are. Refused: a prompt that
    names none."""
    if request.class_label is not None:
        return request.class_label if isinstance(request.class_label, list) else [request.class_label] * request.n
    try:
        return [None if request.prompt is None else class_in(request.prompt, names)] * request.n
    except ConfigError as error:
        raise Refused(str(error), "prompt") from None


def checked_labels(labels: Sequence[int | None], num_classes: int, only: int | None, model: str) -> list[int | None]:
    """Labels for the generator. only: the digit that the model was trained on alone. Refused: not of its classes."""
    for label in labels:
        if label is not None and label >= num_classes:
            raise Refused(f"class_label is 0 to {num_classes - 1}, not {label}", "class_label")
        if only is not None and label not in (None, only):
            raise Refused(f"{model} makes the digit {only} alone", "class_label")
    return [only if label is None else label for label in labels]


def sampling_of(
    request: Sampling, plan: Callable[[SamplingConfig], object], default: SamplingConfig = DEFAULT
) -> SamplingConfig:
    """A request's settings. plan: raises ConfigError on those that the model cannot follow. Refused."""
    return settled(plan, default, **request.model_dump(include=SETTINGS))


def settled(
    plan: Callable[[SamplingConfig], object], default: SamplingConfig = DEFAULT, **chosen: Any
) -> SamplingConfig:
    """The settings chosen, the default's for what is None or left out. Refused: more steps than the model has, or eta
    where the sampler has none."""
    param = "eta"
    try:
        sampling = combined(default, **{key: value for key, value in chosen.items() if value is not None})
        param = "num_inference_steps"
        plan(sampling)
    except ConfigError as error:
        raise Refused(str(error).replace("--", ""), param) from None
    return sampling


@lru_cache(maxsize=1024)
def combined(default: SamplingConfig, **chosen: Any) -> SamplingConfig:
    return dataclasses.replace(default, **chosen)
