"""Trains the two classifiers that images are measured with, and writes their weights.

The package ships its own; train again only to check them, or to measure images that are not MNIST's.

python -m ldm_ray.metrics.train_classifiers --dataset FOLDER --output classifiers
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_ray.files.paths import cache_dir
from ldm_ray.settings.evaluation import ClassifiersConfig
from ldm_ray.terminal import cli, flags

PROG = "python -m ldm_ray.metrics.train_classifiers"
BATCH, WEIGHT_DECAY = 128, 1e-2
EPOCHS = {"lenet": 20, "residual": 12}
MAX_LR = {"lenet": 3e-3, "residual": 6e-3}
log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    config = flags.parse_config(ClassifiersConfig, flags.Parser(prog=PROG, description=__doc__), argv)
    output = cli.folder_path(config.output)
    from ldm_ray.checkpoints.checkpoint import cpu, file_sha256, write
    from ldm_ray.data.sources import load_source
    from ldm_ray.metrics.lenet import NETWORKS, NUM_CLASSES, SIZE, weights_file
    from ldm_ray.settings.errors import DataError

    train, test = (load_source(config.dataset, split, cache_dir(config.cache_dir)) for split in ("train", "test"))
    if train.image_size != (SIZE, SIZE) or max(train.num_classes, test.num_classes) > NUM_CLASSES:
        raise DataError(
            f"{train.name} has {train.num_classes} classes of images of {train.image_size}; the classifiers are of "
            f"{NUM_CLASSES} classes of {SIZE}x{SIZE}"
        )
    (images, labels), (test_images, test_labels) = train.decode(), test.decode()
    print(f"{len(labels)} training and {len(test_labels)} test images of {train.name}")
    for name in NETWORKS:
        network = train_network(name, images, labels, config.seed, config.epochs)
        right = accuracy(network, test_images, test_labels)
        path = weights_file(name, output)
        write(path, cpu(network.state_dict()))
        print(f"{name:<9} test accuracy {100 * right:.2f} %  {path}  SHA-256 {file_sha256(path)}")
    return 0


def train_network(name: str, images: Tensor, labels: Tensor, seed: int = 42, epochs: int | None = None) -> nn.Module:
    """The network of that name trained on images (N, 1, 28, 28) uint8 with labels (N,) int64.

    Everything random follows from the seed: on the same kind of machine, with the same number of threads and
    the same torch, the weights are the same. AdamW, one cycle of the learning rate, images slightly turned,
    sized, slanted and shifted anew in each epoch.
    """
    from ldm_ray.data.digits import warp
    from ldm_ray.data.images import to_float
    from ldm_ray.metrics.lenet import NETWORKS, SIZE

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[name]()
    generator = torch.Generator().manual_seed(seed)
    epochs, count = epochs or EPOCHS[name], len(labels)
    steps = epochs * -(-count // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LR[name], total_steps=steps, pct_start=0.2)
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(count, generator=generator).split(BATCH):
            grid = F.affine_grid(warp(len(rows), generator), [len(rows), 1, SIZE, SIZE], align_corners=False)
            batch = F.grid_sample(to_float(images[rows]), grid, align_corners=False)
            loss = F.cross_entropy(network(batch), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(rows)
        log.info("%s epoch %d/%d loss %.4f", name, epoch + 1, epochs, total / count)
    return network.eval().requires_grad_(False)


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images (N, 1, 28, 28) uint8 whose largest logit is that of the label."""
    from ldm_ray.data.images import to_float

    seen = [network(to_float(part)).argmax(dim=1) for part in images.split(1000)]
    return float((torch.cat(seen) == labels).double().mean())


if __name__ == "__main__":
    cli.run(main, PROG)
