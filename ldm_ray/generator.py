"""From a checkpoint to images: everything that makes an image uses this."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_ray import runs
from ldm_ray.checkpoint import load_diffusion
from ldm_ray.config import MAX_SEED
from ldm_ray.data.images import to_uint8
from ldm_ray.diffusion.guidance import guided
from ldm_ray.diffusion.noise import ImageNoise
from ldm_ray.diffusion.samplers import all_transitions, ddpm
from ldm_ray.diffusion.schedule import NoiseSchedule
from ldm_ray.errors import CheckpointError, ConfigError
from ldm_ray.models.codec import LatentCodec
from ldm_ray.models.denoiser import Denoiser
from ldm_ray.models.registry import REGISTRY

BATCH = 1024
log = logging.getLogger(__name__)


class Generator:
    """Turns seeds and labels into images. B images, D latent."""

    def __init__(
        self, denoiser: Denoiser, codec: LatentCodec, schedule: NoiseSchedule, device: torch.device | str = "cpu"
    ) -> None:
        self.denoiser, self.codec = denoiser.to(device).eval(), codec.to(device)
        self.schedule, self.device = schedule, torch.device(device)
        self.sha256 = ""

    @classmethod
    def open(
        cls,
        path: Path,
        device: torch.device | str = "cpu",
        ae_ckpt: Path | None = None,
        force: bool = False,
        search: Sequence[Path] = (),
    ) -> tuple[Generator, dict[str, Any]]:
        """(generator, the checkpoint's settings).

        Where the file carries no autoencoder and none is given, it is taken from the recorded path, else from
        the folders of ``search`` by its recorded type. Raises CheckpointError, also when there is none.
        """
        loaded = load_diffusion(path, ae_ckpt, force)
        args = loaded.info.get("args", {})
        if loaded.autoencoder is None:
            found = recorded_autoencoder(args, search)
            if found is None:
                raise CheckpointError(
                    f"checkpoint {path} carries no autoencoder: name the {args.get('ae_model', 'autoencoder')} "
                    f"checkpoint it was trained with by --ae-ckpt (it was {args.get('ae_ckpt', 'not recorded')})"
                )
            log.info("autoencoder: %s, found by its recorded type; --ae-ckpt names another", found)
            loaded = load_diffusion(path, found, force)
        assert loaded.autoencoder is not None
        made = cls(loaded.denoiser, loaded.autoencoder.codec, loaded.schedule, device)
        made.sha256 = loaded.sha256
        return made, args

    def labels_of(self, labels: Sequence[int | None]) -> Tensor:
        """(B,) int64; None is unconditional. ConfigError on a label outside the classes."""
        known = self.denoiser.num_classes
        for label in labels:
            if label is not None and not 0 <= label < known:
                raise ConfigError(f"label {label} is outside 0 to {known - 1}")
        null = self.denoiser.null_label
        return torch.tensor([null if label is None else label for label in labels], device=self.device)

    @torch.inference_mode()
    def __call__(
        self,
        seeds: Sequence[int],
        labels: Sequence[int | None],
        guidance_scale: float = 1.0,
        watch: Callable[[int, Tensor], bool | None] | None = None,
    ) -> Tensor:
        """Images (B, 1, H, W) uint8, one per seed, on the CPU.

        watch(step, x0_pred (b, D)) is called after every step; returning False cancels. Raises ConfigError on
        bad seeds or labels, and CheckpointError when the weights give numbers that are not finite.
        """
        if not seeds or len(seeds) != len(labels):
            raise ConfigError(f"{len(seeds)} seeds and {len(labels)} labels: as many of each, at least one")
        if any(not 0 <= seed <= MAX_SEED for seed in seeds):
            raise ConfigError(f"a seed is 0 to {MAX_SEED}")
        if not 0 <= guidance_scale <= 100:
            raise ConfigError(f"a guidance scale is 0 to 100, not {guidance_scale}")
        wanted = self.labels_of(labels)
        parts = [
            self._batch(seeds[i : i + BATCH], wanted[i : i + BATCH], guidance_scale, watch)
            for i in range(0, len(seeds), BATCH)
        ]
        return torch.cat(parts)

    def _batch(
        self,
        seeds: Sequence[int],
        labels: Tensor,
        guidance_scale: float,
        watch: Callable[[int, Tensor], bool | None] | None,
    ) -> Tensor:
        noise = ImageNoise(seeds, self.codec.latent_dim, self.device)
        denoise = guided(self.denoiser, guidance_scale, self.denoiser.null_label)
        transitions = all_transitions(self.schedule.num_train_timesteps)
        latents = noise()
        for step, (now, x0_pred) in enumerate(ddpm(denoise, self.schedule, latents, labels, transitions, noise)):
            latents = now
            if watch is not None and watch(step, x0_pred) is False:
                break
        return self.decode(latents)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Whitened latents (B, D) → images (B, 1, H, W) uint8 on the CPU."""
        images = self.codec.decode(latents)
        if not bool(torch.isfinite(images).all()):
            raise CheckpointError("sampling gave numbers that are not finite: the checkpoint's weights are unusable")
        return to_uint8(images).cpu()


def recorded_autoencoder(args: dict[str, Any], search: Sequence[Path]) -> Path | None:
    """The autoencoder that a checkpoint without one names: its path, else the newest of its type."""
    path = args.get("ae_ckpt")
    if isinstance(path, str) and Path(path).is_file():
        return Path(path)
    kind = str(args.get("ae_model") or "").removeprefix("ae-")
    for folder in search:
        if kind in REGISTRY and folder.is_dir():
            found = runs.find_autoencoder(folder, args.get("ae_only_digit"), [kind])
            if found is not None:
                return Path(found.path)
    return None
