"""The latents that a map shows: of test images, and of images that a denoiser makes.

Shapes: N points, D numbers of a latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_ray.checkpoints import runs
from ldm_ray.checkpoints.checkpoint import AutoencoderCheckpoint, DiffusionCheckpoint, load_autoencoder, load_diffusion
from ldm_ray.checkpoints.choose import completed
from ldm_ray.data.classes import listing, numbered
from ldm_ray.data.recorded import load_own
from ldm_ray.data.sources import ImageSource
from ldm_ray.data.statistics import LatentStatistics
from ldm_ray.devices.device import pick_device
from ldm_ray.engine.generator import Generator
from ldm_ray.files.paths import AnyPath, cache_dir, outdir, to_path
from ldm_ray.metrics.floors import encode
from ldm_ray.models.codec import LatentCodec
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.latents import TsneConfig
from ldm_ray.settings.limits import MAX_SEED


@dataclass(frozen=True, kw_only=True)
class Shown:
    """images (N, 1, H, W) uint8, labels (N,) int64; numbers (N,): the position in the test split, or the seed."""

    images: Tensor
    labels: Tensor
    numbers: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """Raw latents (N, D) in the space of one autoencoder: of the test images, then of those made, if any."""

    autoencoder: AutoencoderCheckpoint
    latents: Tensor


@dataclass(frozen=True, kw_only=True)
class Clouds:
    """What is shown in the space of one autoencoder, or of two."""

    test: Shown
    made: Shown | None
    clouds: list[Cloud]
    class_names: tuple[str, ...]
    source: ImageSource
    denoiser: DiffusionCheckpoint | None
    notes: list[str]  # on the images


def gather(config: TsneConfig) -> Clouds:
    """Reads, encodes and makes all of it. LdmError on what does not go together."""
    device, base = pick_device(config.device), outdir(config.outdir)
    paths = [to_path(path) for path in config.ae_ckpt or ()]
    named = [load_autoencoder(path) for path in paths]
    denoiser = denoiser_of(to_path(config.ckpt), named, base) if config.ckpt else None
    autoencoders = named or [default_autoencoder(denoiser, base)]
    first = denoiser or autoencoders[0]
    (_, source), notes = load_own(first.info, first.path, config.dataset, cache_dir(config.cache_dir))
    for each in autoencoders:
        if source.image_size != each.codec.image_size:
            raise ConfigError(
                f"{each.path} takes images of {each.codec.image_size}, those of {source.name} are {source.image_size}"
            )
    class_names = denoiser.class_names if denoiser else source.class_names
    if denoiser and not same_classes(class_names, source.class_names):
        raise ConfigError(
            f"--ckpt {config.ckpt} makes other classes ({listing(class_names)}) than {source.name} has "
            f"({listing(source.class_names)}): name the --dataset it was trained on"
        )
    test = drawn(source, config.samples, config.seed)
    generated, sampled = made_by(denoiser, len(test), config, device) if denoiser else (None, None)
    clouds = []
    for each in autoencoders:
        codec = each.codec.with_statistics(LatentStatistics.identity(each.codec.latent_dim)).to(device)
        latents = [encode(codec, test.images)]
        if denoiser is not None and generated is not None:
            own = sampled if denoiser.autoencoder_sha256 == each.sha256 else None
            latents.append(encode(codec, generated.images) if own is None else own)
        clouds.append(Cloud(autoencoder=each, latents=torch.cat(latents)))
    return Clouds(
        test=test, made=generated, clouds=clouds, class_names=class_names, source=source, denoiser=denoiser, notes=notes
    )


def same_classes(sampled: Sequence[str], real: Sequence[str]) -> bool:
    """Whether classes can be the same: as many or fewer real ones, and where both have names, the same names."""
    named = tuple(sampled) != numbered(len(sampled)) and tuple(real) != numbered(len(real))
    return tuple(sampled) == tuple(real) if named else len(real) <= len(sampled)


def denoiser_of(path: AnyPath, named: list[AutoencoderCheckpoint], base: AnyPath) -> DiffusionCheckpoint:
    """The denoiser with an autoencoder: its own, else the first named, else one that is found."""
    loaded = load_diffusion(path)
    return loaded.joined(named[0]) if loaded.codec is None and named else completed(loaded, [path.parent, base])


def default_autoencoder(denoiser: DiffusionCheckpoint | None, base: AnyPath) -> AutoencoderCheckpoint:
    autoencoder = (denoiser.autoencoder if denoiser else None) or runs.find_autoencoder(base)
    if autoencoder is None:
        raise ConfigError(
            f"no autoencoder under {base}: name one by --ae-ckpt, or make one with python -m ldm_ray.train_autoencoder"
        )
    return autoencoder


def drawn(source: ImageSource, count: int, seed: int) -> Shown:
    """``count`` images of a source that follow from the seed, all where there are fewer, in their order."""
    rows = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    table = source.table.take(rows.numpy())
    images, labels = dataclasses.replace(source, table=table).decode()
    return Shown(images=images, labels=labels, numbers=torch.from_numpy(table["index"].to_numpy().copy()))


def made_by(
    denoiser: DiffusionCheckpoint, count: int, config: TsneConfig, device: torch.device
) -> tuple[Shown, Tensor | None]:
    """(images, their raw latents (N, D), None where pixels are diffused) of every class in turn."""
    if config.seed + count - 1 > MAX_SEED:
        raise ConfigError(f"--seed {config.seed} with {count} images goes beyond the last seed, {MAX_SEED}")
    generator = Generator.of(denoiser, device)
    seeds = range(config.seed, config.seed + count)
    labels = generator.in_turn(count)
    whitened = generator.latents(seeds, labels, config.sampling)
    shown = Shown(
        images=generator.decode(whitened), labels=torch.tensor(labels), numbers=torch.tensor(seeds, dtype=torch.int64)
    )
    codec = generator.codec
    return shown, codec.colour(whitened).cpu() if isinstance(codec, LatentCodec) else None
