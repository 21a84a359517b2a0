"""What else goes in and comes out, as pydantic models; unknown fields are refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ldm_ray.engine.schema import MAX_IMAGES, MAX_SCALE, Label, Output, Sampling, Seed, Strict, Whole
from ldm_ray.settings.latents import METHODS
from ldm_ray.settings.limits import MAX_GUIDANCE, MAX_SEED, MAX_STEPS
from ldm_ray.settings.sampling import SAMPLERS

Number = Annotated[float, Field(strict=True, ge=-1000, le=1000, allow_inf_nan=False)]


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
