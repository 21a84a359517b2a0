"""Every setting of the service, once: arguments of ``serve run serve.app:deployment`` and of config files."""

import os
import re
from typing import Any, Literal

import click
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ldm_ray.files.paths import AnyPath, outdir, to_path
from ldm_ray.settings.errors import CheckpointError, ConfigError, LdmError
from ldm_ray.settings.gpu_share import MOST, check_share
from ldm_ray.settings.limits import SIDE
from ldm_ray.settings.shared import DEVICES


class Mistake(click.ClickException):
    """A user's mistake: ``serve run`` prints one line and exits with 2."""

    exit_code = 2


class Settings(BaseModel):
    """Bounds are checked before anything starts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ckpt: str | None = Field(default=None, description="denoiser checkpoint [the newest under outdir]")
    ae_ckpt: str | None = Field(default=None, description="autoencoder checkpoint [the one inside]")
    outdir: str | None = Field(default=None, description="where checkpoints are found [$SCRATCH, else ./outputs]")
    device: Literal[DEVICES] | None = Field(default=None, description="[the best there is]")  # type: ignore[valid-type]
    token: str | None = Field(default=None, description="bearer token of all routes but health [$LDM_RAY_TOKEN]")
    replicas: str = Field(default="1", description="replicas: a number, or MIN-MAX to scale with the load")
    gpus_per_replica: float | None = Field(
        default=None, gt=0, le=MOST, description="GPUs of a replica, such as 0.5 [1 where there are GPUs]"
    )
    accelerator_type: str | None = Field(default=None, description="type of GPU of the replicas, such as L4 [any]")
    threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads of a replica [all cores]")
    models: int = Field(default=4, ge=1, le=64, description="checkpoints that a replica keeps loaded")
    max_work: int = Field(default=512_000, ge=1, description="largest request: n × steps, guided ones twice")
    max_queue: int = Field(default=2_048_000, ge=1, description="the same over all requests that a replica has taken")
    max_images: int = Field(default=16_384, ge=1, description="images over all requests that a replica has taken")
    max_pixels: int = Field(default=67_108_864, ge=784, description="largest answer: n × width × height × frames")
    deadline_s: float = Field(default=60.0, gt=0, le=86_400, description="seconds after which a request ends with 408")
    drain_s: float = Field(default=20.0, ge=0, le=3_600, description="seconds that running requests get at shutdown")
    body_s: float = Field(default=10.0, gt=0, le=3_600, description="seconds within which a request's body must come")
    cors: str = Field(default="", description="origins whose pages may ask: https://a.example,https://b.example, or *")
    max_body: int = Field(default=1_048_576, ge=1024, description="largest request body in bytes")

    @classmethod
    def model_validate(cls, obj: Any, **more: Any) -> "Settings":
        """As pydantic's, but a mistake is one line."""
        try:
            made = super().model_validate(obj, **more)
            made.replica_range()
            if made.gpus_per_replica is not None:
                check_share("gpus_per_replica", made.gpus_per_replica)
            return made
        except ConfigError as error:
            raise Mistake(str(error)) from None
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            known = f"; known are {', '.join(cls.model_fields)}" if first["type"] == "extra_forbidden" else ""
            raise Mistake(f"{name}: {first['msg']}{known}") from None

    def replica_range(self) -> tuple[int, int]:
        """(fewest, most) replicas."""
        match = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", self.replicas)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high:
            raise Mistake(f"replicas is a number from 1, or MIN-MAX such as 1-4, not {self.replicas!r}")
        return low, high

    def resolved(self) -> "Settings":
        """With absolute paths and the token of the environment, for replicas that run elsewhere. Mistake: no
        checkpoint."""
        from ldm_ray.checkpoints.choose import named_or_newest

        try:
            base = outdir(self.outdir)
            ckpt = named_or_newest(self.ckpt, base, " by ckpt=PATH").absolute()
            exists = ckpt.is_file()
        except LdmError as error:  # there is none, or an object store does not answer
            raise Mistake(str(error)) from None
        if not exists:
            raise Mistake(f"ckpt={ckpt} is not a file")
        return self.model_copy(
            update={
                "ckpt": str(ckpt),
                "ae_ckpt": str(to_path(self.ae_ckpt).absolute()) if self.ae_ckpt else None,
                "outdir": str(base),
                "token": self.token or os.environ.get("LDM_RAY_TOKEN") or None,
            }
        )


def check_size(path: AnyPath, image_size: tuple[int, int]) -> None:
    """CheckpointError unless a checkpoint makes images of the size that requests name."""
    if image_size != (SIDE, SIDE):
        height, width = image_size
        raise CheckpointError(f"checkpoint {path} makes images of {height}x{width}; the service is of {SIDE}x{SIDE}")


def check(ckpt: str, ae_ckpt: str | None, outdir: str) -> None:
    """Opens a checkpoint as a replica will. Mistake in one line when it cannot be used."""
    from ldm_ray.engine.generator import Generator

    try:
        path = to_path(ckpt)
        search = [path.parent, to_path(outdir)]
        made = Generator.open(path, "cpu", to_path(ae_ckpt) if ae_ckpt else None, search=search)
        check_size(path, made.codec.image_size)
    except (ConfigError, ValueError) as error:
        raise Mistake(str(error)) from None
