"""From a checkpoint to images: everything that makes an image uses this."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from ldm_ray.checkpoints.checkpoint import DiffusionCheckpoint
from ldm_ray.checkpoints.choose import load
from ldm_ray.data.classes import numbered
from ldm_ray.data.images import to_uint8
from ldm_ray.devices.device import numerics_of, sent, settle
from ldm_ray.diffusion.guidance import guided
from ldm_ray.diffusion.noise import AHEAD, ImageNoise
from ldm_ray.diffusion.samplers import Denoise, Plan, sample
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.engine.request import STILL, Course, ImageRequest, course_of
from ldm_ray.engine.tabled import TabledDenoiser, for_sampling
from ldm_ray.engine.tiles import PIXEL_SIZES, PIXEL_WHOLE, SIZES, WHOLE, Tiles, single_threaded, within_room
from ldm_ray.files.paths import AnyPath
from ldm_ray.models.codec import Codec, PixelCodec
from ldm_ray.models.conditioning import ConditionedDenoiser
from ldm_ray.models.unet import UNet
from ldm_ray.settings.errors import CheckpointError, ConfigError
from ldm_ray.settings.sampling import SamplingConfig
from ldm_ray.terminal.progress import Progress

CHANNELS = 32  # of an autoencoder's widest layer, for each pixel
ENGINE = 2  # goes up with every change to what a seed's bytes are
DEFAULT = SamplingConfig()
Watch = Callable[[int, int, Tensor], None]


class Generator:
    """Turns seeds and labels into images. B images, D latent."""

    def __init__(
        self,
        denoiser: ConditionedDenoiser,
        codec: Codec,
        schedule: NoiseSchedule,
        device: torch.device | str = "cpu",
        prediction_type: str = "epsilon",
    ) -> None:
        self.device = settle(device)
        self.codec, self.schedule, self.prediction_type = codec.to(self.device), schedule, prediction_type
        self.num_classes, self.null_label = denoiser.num_classes, denoiser.null_label
        self.class_names, self.labels = numbered(denoiser.num_classes), tuple(range(denoiser.num_classes))
        self.sha256 = ""
        self.only_digit: int | None = None
        unet = isinstance(denoiser, UNet)
        numbers = math.prod(codec.image_size) * (denoiser.hidden_dim if unet else CHANNELS)
        sizes, whole = (PIXEL_SIZES, PIXEL_WHOLE) if unet else (SIZES, WHOLE)
        self.sizes = within_room(sizes, numbers)
        with single_threaded():
            self.denoiser: Denoise = for_sampling(denoiser.to(self.device).eval(), schedule.num_train_timesteps)
        self.tiles = Tiles(
            partial(self._all_matrix_work, self.denoiser), codec.latent_dim, self.device, self.sizes, whole
        )

    @classmethod
    def open(
        cls,
        path: AnyPath,
        device: torch.device | str = "cpu",
        ae_ckpt: AnyPath | None = None,
        force: bool = False,
        search: Sequence[AnyPath] = (),
    ) -> Generator:
        """What ``load`` reads, on a device. Raises CheckpointError."""
        return cls.of(load(path, ae_ckpt, force, search), device)

    @classmethod
    def of(cls, loaded: DiffusionCheckpoint, device: torch.device | str = "cpu") -> Generator:
        """From a checkpoint that was read with its autoencoder."""
        assert loaded.codec is not None
        generator = cls(loaded.denoiser, loaded.codec, loaded.schedule, device, loaded.prediction_type)
        generator.sha256, generator.class_names, generator.labels = loaded.sha256, loaded.class_names, loaded.labels
        generator.only_digit = loaded.only_digit
        return generator

    def in_turn(self, count: int, only: int | None = None) -> list[int]:
        """Labels of so many images: one class alone where it is named or the model was trained on one, else each of
        which there were images in turn."""
        only = self.only_digit if only is None else only
        return [self.labels[i % len(self.labels)] if only is None else only for i in range(count)]

    @property
    def fingerprint(self) -> str:
        """``fingerprint_of`` its device, in fp32."""
        return self.fingerprint_in("fp32")

    def fingerprint_in(self, precision: str) -> str:
        """``fingerprint_of`` its device, in this precision."""
        return fingerprint_of(self.device, precision)

    def __call__(
        self,
        seeds: Sequence[int],
        labels: Sequence[int | None],
        sampling: SamplingConfig = DEFAULT,
        watch: Watch | None = None,
    ) -> Tensor:
        """Images (B, 1, H, W) uint8 on the CPU, one per seed; a label of None is unconditional.

        An image's bytes follow from its own seed and label, the settings, the checkpoint and ``fingerprint``,
        whatever is made with it. watch(i, step, x0_pred (n, D)) is called after every step of the n images from
        the i-th, in their thread. ConfigError: seeds, labels or settings that the model cannot take; CheckpointError:
        images that are not finite, with their seeds.
        """
        images, finite = self.make(seeds, labels, sampling, watch)
        if not bool(finite.all()):
            bad = [str(seed) for seed, fine in zip(seeds, finite.tolist(), strict=True) if not fine]
            raise CheckpointError(
                f"{len(bad)} of {len(seeds)} images came out as numbers that are not finite (seeds "
                f"{', '.join(bad[:5])}{', …' * (len(bad) > 5)}): the checkpoint's weights are unusable"
            )
        return images

    def make(
        self,
        seeds: Sequence[int],
        labels: Sequence[int | None],
        sampling: SamplingConfig = DEFAULT,
        watch: Watch | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(images, finite (B,) bool): the same, but images that are not finite are marked rather than an error."""
        parts = self._tiled(seeds, labels, sampling, watch, decode=True)
        images, finite = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        return images, finite

    def latents(self, seeds: Sequence[int], labels: Sequence[int | None], sampling: SamplingConfig = DEFAULT) -> Tensor:
        """Whitened latents (B, D) float32, from which ``decode`` makes the images."""
        with self.progress(f"making {len(seeds):,} latents", len(seeds), sampling) as progress:
            return torch.cat([part[0] for part in self._tiled(seeds, labels, sampling, progress.watch, decode=False)])

    def progress(self, what: str, count: int, sampling: SamplingConfig) -> Progress:
        """A display of progress for so many images, whose ``watch`` moves it. ConfigError as ``plan``."""
        return Progress(what, count * len(self.plan(sampling)))

    def plan(self, sampling: SamplingConfig) -> Plan:
        """The steps that these settings take. ConfigError: more than the model has timesteps."""
        return course_of(self.schedule, sampling, self.prediction_type).plan

    def course(self, request: ImageRequest) -> Course:
        """A request's steps, once it is checked against this model. ConfigError: the model cannot make it."""
        request.check(self.num_classes, self.codec.latent_dim)
        return STILL if request.sampling is None else course_of(self.schedule, request.sampling, self.prediction_type)

    def decode(self, latents: Tensor) -> Tensor:
        """Whitened latents (B, D) → images (B, 1, H, W) uint8 on the CPU. CheckpointError when not finite."""
        size = self.tiles.size_for(len(latents))
        parts = self.tiles.map(partial(self.decode_tile, size=size), latents.to(self.device).split(size))
        images, finite = (torch.cat(part) for part in zip(*parts, strict=True))
        if not bool(finite.all()):
            raise CheckpointError("decoding gave numbers that are not finite: latents or weights are unusable")
        return images.cpu()

    @torch.inference_mode()
    def decode_tile(self, latents: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Whitened latents (n, D) of at most ``size`` images → (images (n, 1, H, W) uint8, finite (n,) bool), on the
        device and in one tile of this size."""
        pixels = self.codec.decode(filled(latents, size))[: len(latents)]
        return to_uint8(pixels.nan_to_num()), all_finite(pixels)

    def labels_of(self, labels: Sequence[int | None]) -> Tensor:
        """(B,) int64 on the device; None becomes the label that is unconditional."""
        return sent(torch.tensor([self.null_label if label is None else label for label in labels]), self.device)

    def _tiled(
        self,
        seeds: Sequence[int],
        labels: Sequence[int | None],
        sampling: SamplingConfig,
        watch: Watch | None,
        decode: bool,
    ) -> list[tuple[Tensor, Tensor]]:
        plan = self.course(ImageRequest(seeds, labels, sampling)).plan
        denoiser, tiles = self._in_bf16 if sampling.precision == "bf16" else (self.denoiser, self.tiles)
        denoisers = denoiser, guided(denoiser, sampling.guidance_scale, self.null_label)
        size = tiles.size_for(len(seeds))
        rows = sent(torch.tensor(seeds, dtype=torch.int64), self.device), self.labels_of(labels)  # (B,) each

        def work(first: int) -> tuple[Tensor, Tensor]:
            tile = rows[0][first : first + size], rows[1][first : first + size]
            return self._tile(size, first, *tile, plan, denoisers, watch, decode)

        return tiles.map(work, range(0, len(seeds), size))

    @torch.inference_mode()
    def _tile(
        self,
        size: int,
        first: int,
        seeds: Tensor,
        labels: Tensor,
        plan: Plan,
        denoisers: tuple[Denoise, Denoise],
        watch: Watch | None,
        decode: bool,
    ) -> tuple[Tensor, Tensor]:
        """(images (n, 1, H, W) uint8, or latents (n, D); finite (n,)) of the n ≤ size images from ``first``, of
        these seeds, labels (n,), by a denoiser and its guided form."""
        count = len(seeds)
        ahead = min(AHEAD, len(plan)) if any(step.sigma for step in plan) else 1
        noise = ImageNoise(filled(seeds, size), self.codec.latent_dim, ahead)
        denoise, denoise_guided = denoisers
        steps = sample(denoise, plan, noise(0), filled(labels, size), noise, denoise_guided)
        for step, state in enumerate(steps):
            if watch is not None:
                watch(first, step, state[1][:count])
        latents = state[0]
        if not decode:
            return latents[:count], all_finite(latents[:count])
        images, finite = self.decode_tile(latents, size)
        return images[:count], finite[:count]

    @cached_property
    def _in_bf16(self) -> tuple[Denoise, Tiles]:
        """The denoiser with bf16 matrices, and tiles checked for its bits."""
        check_precision("bf16", self.codec)
        assert isinstance(self.denoiser, TabledDenoiser)
        denoiser = self.denoiser.in_bf16()
        return denoiser, Tiles(partial(self._all_matrix_work, denoiser), self.codec.latent_dim, self.device, self.sizes)

    def _all_matrix_work(self, denoiser: Denoise, latents: Tensor, t: Tensor, labels: Tensor) -> list[Tensor]:
        both = guided(denoiser, 2.0, self.null_label)(latents, t, labels)
        return [denoiser(latents, t, labels), both, self.codec.decode(latents)]


def fingerprint_of(device: torch.device, precision: str = "fp32") -> str:
    """12 hexadecimal digits of what, beside checkpoint, seed, label and settings, an image's bytes follow from: this
    engine, the version of PyTorch and the kind of device; of a GPU also the versions of CUDA and the largest tiles."""
    kind = torch.backends.cpu.get_cpu_capability()
    tiles = {}
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
        tiles = {"tiles": [SIZES["cuda"][-1], PIXEL_SIZES["cuda"][-1]]}
    elif precision == "bf16":
        kind += bf16_bits()
    facts = {"engine": ENGINE, "torch": str(torch.__version__), "device": device.type, "kind": kind}
    facts |= numerics_of(device) | tiles
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def check_precision(precision: str, codec: Codec | None) -> None:
    """ConfigError where a model of this codec does not sample in this precision."""
    if precision != "fp32" and isinstance(codec, PixelCodec):
        raise ConfigError(
            f"--precision {precision} is for models of latents; the U-Net of a pixel model samples in fp32"
        )


@lru_cache(maxsize=1)
def bf16_bits() -> str:
    """Hexadecimal digits of a bf16 product on this processor: capabilities of one name have bf16 or have it not."""
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(count, 256, generator=random).bfloat16() for count in (64, 256))
    with single_threaded(), torch.inference_mode():
        product = torch.nn.functional.linear(x, weight)
    return hashlib.sha256(product.view(torch.int16).numpy().tobytes()).hexdigest()


def all_finite(rows: Tensor) -> Tensor:
    """(n, …) → (n,) bool."""
    return torch.isfinite(rows).flatten(1).all(dim=1)


def filled(rows: Tensor, size: int) -> Tensor:
    """(n, …) → (size, …): the first row again where rows are missing."""
    if len(rows) == size:
        return rows
    return torch.cat([rows, rows[:1].expand(size - len(rows), *rows.shape[1:])])
