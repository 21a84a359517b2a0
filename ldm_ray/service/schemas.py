"""What goes in and comes out, as pydantic models; unknown fields are refused. The bounds of every field are here."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ldm_ray.service.settings import SIDE
from ldm_ray.settings.latents import METHODS
from ldm_ray.settings.limits import MAX_CLASSES, MAX_GUIDANCE, MAX_SEED, MAX_STEPS
from ldm_ray.settings.sampling import SAMPLERS

MAX_IMAGES = 256
MAX_SCALE = 16


def whole(value: Any) -> Any:
    """8.0 is an integer to JSON Schema."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(whole)
Seed = Annotated[int, Field(strict=True, ge=0, le=MAX_SEED), Whole]
Label = Annotated[int, Field(strict=True, ge=0, le=MAX_CLASSES - 1), Whole]
Steps = Annotated[int, Field(strict=True, ge=1, le=MAX_STEPS), Whole]
Partial = Annotated[int, Field(strict=True, ge=0, le=16), Whole]
Each = Field(min_length=1, max_length=MAX_IMAGES, fail_fast=True)
Number = Annotated[float, Field(strict=True, ge=-1000, le=1000, allow_inf_nan=False)]


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
    def check_together(self) -> "GenerationRequest":
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


class Asked(Strict):
    """A query: ``steps=`` without a value is left out."""

    @model_validator(mode="before")
    @classmethod
    def without_empty(cls, value: Any) -> Any:
        return {name: each for name, each in value.items() if each != ""} if isinstance(value, dict) else value


class Permalink(Asked):
    """The query of GET /v1/images/{model}/{label}/{seed}.png"""

    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance: float | None = Field(None, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)
    sampler: Literal[SAMPLERS] | None = None  # type: ignore[valid-type]
    scale: int = Field(1, ge=1, le=MAX_SCALE, description="pixels for each pixel")


class End(Strict):
    """One end of an interpolation."""

    seed: Seed
    class_label: Label | None = None


class InterpolationRequest(Sampling):
    """POST /v1/images/interpolations"""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {"start": {"seed": 1, "class_label": 3}, "end": {"seed": 2, "class_label": 8}, "n": 8}
        },
    )

    start: End
    end: End
    n: Annotated[int, Field(strict=True, ge=2, le=64, description="images, with both ends"), Whole] = 8
    method: Literal[METHODS] = "linear"  # type: ignore[valid-type]


class DecodeRequest(Output):
    """POST /v1/latents/decode"""

    latents: list[Annotated[list[Number], Field(min_length=1, max_length=4096, fail_fast=True)]] = Field(
        min_length=1,
        max_length=MAX_IMAGES,
        fail_fast=True,
        description="whitened latents, each of the model's latent_size",
    )


class MapQuery(Asked):
    """The query of GET /v1/latents/map"""

    model: str | None = Field(None, max_length=200)
    n: int = Field(200, ge=10, le=256, description="points")
    seed: int = Field(0, ge=0, le=MAX_SEED - 256)


class ImageItem(BaseModel):
    """An image, or what became of it."""

    b64_json: str | None = Field(None, description="PNG with its parameters as text")
    seed: int | None = None
    label: int | None = None
    sha256: str | None = Field(None, description="of the PNG")
    error: dict[str, Any] | None = None


class ImagesResponse(BaseModel):
    created: int
    model: str
    data: list[ImageItem]
    size: str
    output_format: str = "png"
    num_inference_steps: int | None = None
    sampler: str | None = None
    guidance_scale: float | None = None
    fingerprint: str | None = Field(None, description="what bytes follow from, beside the request and the checkpoint")


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorBody


def scale_of(size: str) -> int:
    """The whole number that ``28x28`` is multiplied by, 1 for ``auto``. ValueError on anything else."""
    if size == "auto":
        return 1
    match = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", size)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if width != height or width % SIDE or not 1 <= width // SIDE <= MAX_SCALE:
        raise ValueError(f"a size is 28x28 times a whole number up to {MAX_SCALE}: 28x28, 56x56, … 448x448")
    return width // SIDE
