"""The two digit classifiers that images are measured with, and their shipped weights.

``lenet`` is the feature extractor of FD-LeNet and of the neighbour figures; ``residual``, of another build, says
which digit an image shows, so that accuracy is not judged by the network that the distance is measured in. Both
were trained on the training split of MNIST by ``python -m ldm_ray.metrics.train_classifiers``. Figures are
comparable between installs because the files are: their SHA-256 is checked before they are opened.

Shapes: B batch; images are (B, 1, 28, 28) uint8, as they are stored, so that quantisation is part of every figure.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_ray.data.images import to_float
from ldm_ray.devices.device import settle
from ldm_ray.settings.errors import CheckpointError, DataError

SIZE, NUM_CLASSES, FEATURES = 28, 10, 84
BATCH = 1000
FOLDER = Path(__file__).parent / "weights"
SHA256 = {
    "lenet": "7a7bf063b2286e8c2399bd4aa1c9b34e9db7bea4e836257a7301b8e2539b3dc9",
    "residual": "5e1a2871472762d7ffc709de9fa12c3a528b8de4069eef4070aa1a22b22691e2",
}
MNIST_TEST = (  # of each digit's test images: the start of the SHA-256 over their sorted SHA-256 sums
    *("f63d3568995b49b7", "177240202c2b617c", "b6643c57e9d48b6e", "f8b58969c1a968bd", "812e93ac70161a70"),
    *("f3077a2ba153fff4", "45ceeb7039194f58", "7809239fcb9ed884", "1f1a9cbb80307ce3", "147dcf089c718562"),
)


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al., 1998) with ReLU and max pooling, over 28×28 inputs without padding: 44,426 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(256, 120), nn.Linear(120, FEATURES), nn.Linear(FEATURES, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """(B, 1, 28, 28) float in [0, 1] → the activations (B, 84), not negative, before the last layer."""
        h = F.max_pool2d(F.relu(self.conv1(2 * images - 1)), 2)  # (B, 6, 12, 12)
        h = F.max_pool2d(F.relu(self.conv2(h)), 2)  #              (B, 16, 4, 4)
        return F.relu(self.fc2(F.relu(self.fc1(h.flatten(1)))))  # (B, 84)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, 28, 28) float in [0, 1] → logits (B, 10)."""
        return self.fc3(self.features(images))


class Residual(nn.Module):
    """Strided 5×5 and 3×3 convolutions, one residual block, SiLU, global average: 93,834 weights, and nothing like
    the fully connected half of LeNet-5."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(1, 32, 5, stride=2, padding=2), nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.block1, self.block2 = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, 28, 28) float in [0, 1] → logits (B, 10)."""
        h = F.silu(self.stem(2 * images - 1)).contiguous(memory_format=torch.channels_last)  # (B, 32, 14, 14)
        h = F.silu(self.down(h))  #                      (B, 64, 7, 7)
        h = F.silu(h + self.block2(F.silu(self.block1(h))))
        return self.head(h.mean(dim=(2, 3)))


NETWORKS: dict[str, type[nn.Module]] = {"lenet": LeNet5, "residual": Residual}


class Classifiers:
    """The shipped networks on a device, over uint8 images of any number, ``BATCH`` at a time."""

    def __init__(self, lenet: LeNet5, residual: Residual, device: torch.device | str = "cpu") -> None:
        self.lenet = lenet.to(device).eval().requires_grad_(False)
        self.residual = residual.to(device).eval().requires_grad_(False)
        self.device = settle(device)

    @classmethod
    def shipped(cls, device: torch.device | str = "cpu", folder: Path = FOLDER) -> Classifiers:
        """Those of this package. CheckpointError when a file is missing or is not the one with the known hash."""
        lenet, residual = load("lenet", folder), load("residual", folder)
        assert isinstance(lenet, LeNet5) and isinstance(residual, Residual)
        return cls(lenet, residual, device)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """(N, 1, 28, 28) uint8 → (N, 84) float64 on the device. DataError on images of another shape or type."""
        return torch.cat([self.lenet.features(part) for part in self._batches(images)]).double()

    @torch.inference_mode()
    def classify(self, images: Tensor) -> Tensor:
        """(N, 1, 28, 28) uint8 → the digit that ``residual`` sees (N,) int64 on the CPU. DataError as above."""
        return torch.cat([self.residual(part).argmax(dim=1) for part in self._batches(images)]).cpu()

    def _batches(self, images: Tensor) -> list[Tensor]:
        check_images(images)
        return [to_float(part.to(self.device)) for part in images.split(BATCH)]


def check_images(images: Tensor) -> None:
    """DataError unless images are (N, 1, 28, 28) uint8 and N is at least 1."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1:] != (1, SIZE, SIZE) or not len(images):
        raise DataError(
            f"images of {images.dtype} {tuple(images.shape)} cannot be measured; "
            f"needed are uint8 (N, 1, {SIZE}, {SIZE}), at least one"
        )


def is_mnist(images: Tensor, labels: Tensor) -> bool:
    """Whether test images (N, 1, H, W) uint8 with labels (N,) int64 are MNIST's, which the shipped networks are for:
    all of each digit that is there, in any order."""
    for digit in labels.unique().tolist():
        sums = sorted(hashlib.sha256(image.numpy().tobytes()).digest() for image in images[labels == digit])
        if digit >= NUM_CLASSES or hashlib.sha256(b"".join(sums)).hexdigest()[:16] != MNIST_TEST[digit]:
            return False
    return True


def others_note(name: str) -> str:
    """What a reader of figures of other images than MNIST's must know. name: the dataset's."""
    return (
        f"the classifiers behind the figures were trained on MNIST, and {name} holds other images: compare these "
        "figures with each other alone"
    )


def weights_file(name: str, folder: Path = FOLDER) -> Path:
    return folder / f"{name}.pt"


def load(name: str, folder: Path = FOLDER) -> nn.Module:
    """A shipped network by name. CheckpointError when its file is missing or is not the one with the known hash."""
    path = weights_file(name, folder)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"classifier weights {path}: {error.strerror or error}; install ldm_ray again") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256[name]:
        raise CheckpointError(
            f"classifier weights {path} have SHA-256 {digest}, not {SHA256[name]}: figures would not be comparable; "
            "install ldm_ray again"
        )
    network = NETWORKS[name]()
    network.load_state_dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    return network
