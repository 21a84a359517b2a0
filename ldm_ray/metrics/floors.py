"""What the figures of samples are read against: the floors of an autoencoder, and simpler priors over its latents.

Shapes: T training images, D latent.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ldm_ray.data.images import to_float, to_uint8
from ldm_ray.data.statistics import LatentStatistics
from ldm_ray.metrics import mixture
from ldm_ray.metrics.quality import Reference, quality
from ldm_ray.models.codec import Codec, LatentCodec
from ldm_ray.terminal.progress import Progress

SEED = 0  # of the choice of training images and of the mixtures, so that floors are the same everywhere
BATCH = 1000
COMPONENTS = (1, 10, 100)
ROWS_PER_COMPONENT = 20  # with fewer latents than that the mixture is left out
MOST_NUMBERS = 64  # of a latent; full covariances of more take too long to fit
FLOOR_A, FLOOR_C = "train", "train_decoded"
log = logging.getLogger(__name__)


def floors(
    codec: Codec,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    reference: Reference,
    count: int,
    baselines: bool = True,
) -> dict[str, dict[str, Any]]:
    """Figures as of ``quality`` by name, each of ``count`` images (or all, where there are fewer):

    - ``train`` (a): random training images; no generator does better, but by chance or by copying;
    - ``test_decoded`` (b): decode(encode(random test images));
    - ``train_decoded`` (c): decode(encode(the images of (a))): the best any prior over these latents can do;
    - with baselines, ``gaussian``, ``gmm_10``, ``gmm_100`` (d): decoded samples of Gaussian mixtures with full
      covariances, fitted to the latents of all training images. They know no labels, so have no accuracy. Those of
      more than 64 numbers are left out.

    Pixel space has (a) alone: it decodes what it encodes, and 784 numbers are too many for a mixture.

    train, test: images (·, 1, 28, 28) uint8 and labels (·,) int64.
    """
    some, labels = chosen(train, count)
    tested, test_labels = chosen(test, count)
    sets: list[tuple[str, Tensor, Tensor | None]] = [(FLOOR_A, some, labels)]
    if isinstance(codec, LatentCodec):
        sets.append(("test_decoded", reconstruct(codec, tested), test_labels))
        sets.append((FLOOR_C, reconstruct(codec, some), labels))
        if baselines and codec.latent_dim <= MOST_NUMBERS:
            sets += mixtures(codec, train[0], count)
        elif baselines:
            log.info("no Gaussians are fitted to latents of %d numbers: at most %d", codec.latent_dim, MOST_NUMBERS)
    figures = {}
    for name, images, asked in sets:
        with Progress(f"floor {name}: measuring {len(images):,} images"):
            figures[name] = quality(images, asked, reference)
        log.info("floor %s: FD-LeNet %.2f", name, figures[name]["fd_lenet"])
    return figures


def chosen(images_labels: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """``count`` random images with their labels, all where there are fewer; the same ones every time."""
    images, labels = images_labels
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))[:count]
    return images[rows], labels[rows]


def reconstruct(codec: Codec, images: Tensor) -> Tensor:
    """decode(encode(images)), (N, 1, 28, 28) uint8 on the CPU, quantised as samples are."""
    return decode(codec, encode(codec, images))


def encode(codec: Codec, images: Tensor) -> Tensor:
    """(N, 1, 28, 28) uint8 → (N, D) on the CPU."""
    parts = []
    with Progress("encoding images", len(images)) as progress:
        for part in images.split(BATCH):
            parts.append(codec.encode(to_float(part.to(codec.mean.device))).cpu())
            progress.advance(len(part))
    return torch.cat(parts)


def decode(codec: Codec, latents: Tensor) -> Tensor:
    """(N, D) → (N, 1, 28, 28) uint8 on the CPU."""
    parts = []
    with Progress("decoding latents", len(latents)) as progress:
        for part in latents.split(BATCH):
            parts.append(to_uint8(codec.decode(part.to(codec.mean.device))).cpu())
            progress.advance(len(part))
    return torch.cat(parts)


def mixtures(codec: LatentCodec, train: Tensor, count: int) -> Iterator[tuple[str, Tensor, None]]:
    """(name, decoded images (count, 1, 28, 28) uint8, None) of one Gaussian and of each mixture, fitted by EM."""
    device = codec.mean.device
    raw = encode(codec.with_statistics(LatentStatistics.identity(codec.latent_dim)).to(device), train)
    codec = codec.with_statistics(LatentStatistics.of(raw)).to(device)  # whatever the checkpoint whitened with
    latents = codec.whiten(raw.to(device))
    for components in COMPONENTS:
        if len(latents) < components * ROWS_PER_COMPONENT:
            continue
        title = "one Gaussian" if components == 1 else f"{components} Gaussians"
        with Progress(f"fitting {title}, steps at most", mixture.MOST_STEPS) as progress:
            fitted = mixture.fit(latents, components, SEED, progress.advance)
        name = "gaussian" if components == 1 else f"gmm_{components}"
        yield name, decode(codec, fitted.sample(count, SEED)), None


def autoencoder_hash(codec: Codec) -> str:
    """SHA-256 over the autoencoder's weights, by name; the whitening does not matter to the floors. "pixels" in pixel
    space."""
    if not isinstance(codec, LatentCodec):
        return codec.kind
    digest = hashlib.sha256()
    for name, tensor in sorted(codec.model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
