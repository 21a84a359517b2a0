"""All figures of a set of images against the real ones: ``quality``.

It takes any number of images, so a training loop or a search can call it with a few hundred; figures of different
counts are not comparable with each other (the Fréchet distance falls as the count grows).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_ray.metrics.frechet import FeatureStatistics, frechet_distance
from ldm_ray.metrics.lenet import NUM_CLASSES, Classifiers
from ldm_ray.metrics.neighbours import nearest, neighbour_figures, radii
from ldm_ray.settings.errors import DataError

CLOSE = 0.01  # quantile of the test images' distances to the training images under which an image is "close"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What images are compared with, computed once. N test images, F features.

    features (N, F) float64; radii (2, N) as of ``neighbours.radii``; train (T, 1, 28, 28) uint8 or None, and
    then the distances (N,) of the test images to the nearest of them.
    """

    classifiers: Classifiers
    features: Tensor
    statistics: FeatureStatistics
    radii: Tensor
    train: Tensor | None = None
    test_to_train: Tensor | None = None

    @classmethod
    def of(cls, test: Tensor, train: Tensor | None = None, classifiers: Classifiers | None = None) -> Reference:
        """test (N, 1, 28, 28) uint8 and, for the memorisation figures, train. The shipped classifiers by default."""
        classifiers = classifiers or Classifiers.shipped()
        features = classifiers.features(test)
        train = None if train is None else train.to(classifiers.device)
        return cls(
            classifiers=classifiers,
            features=features,
            statistics=FeatureStatistics.of(features),
            radii=radii(features),
            train=train,
            test_to_train=None if train is None else nearest(test.to(classifiers.device), train)[0],
        )


def quality(
    images: Tensor,
    labels: Tensor | None,
    reference: Reference,
    *,
    neighbours: bool = True,
    memorisation: bool = True,
) -> dict[str, Any]:
    """The figures of images (M, 1, 28, 28) uint8 that were asked for with labels (M,) int64 (None: with none).

    - ``count``; ``fd_lenet``: Fréchet distance in the 84 features of LeNet-5, never to be called FID;
    - ``precision``, ``recall``, ``density``, ``coverage`` (neighbours; at least 6 images);
    - ``histogram``: images per digit as the second classifier sees them, 10 counts;
    - with labels, ``accuracy``: share seen as their label, and ``accuracy_per_class`` (None: no such label);
    - with memorisation and training images in the reference, ``nearest_train``: mean pixel distance to the nearest
      training image, ``nearest_train_ratio``: that over the test images' own, and ``close_to_train``: share nearer
      than 99 % of the test images are; about 0.01 for images as new as those, near 1 for copies.

    DataError on images of another type or shape, too few of them, or labels that do not match.
    """
    if labels is not None and (labels.shape != (len(images),) or not 0 <= int(labels.min()) <= int(labels.max()) < 10):
        raise DataError(f"labels {tuple(labels.shape)} do not match {len(images)} images, or are outside 0 to 9")
    features = reference.classifiers.features(images)
    figures: dict[str, Any] = {
        "count": len(images),
        "fd_lenet": frechet_distance(FeatureStatistics.of(features), reference.statistics),
    }
    if neighbours:
        figures |= neighbour_figures(reference.features, features, reference.radii)
    seen = reference.classifiers.classify(images)
    figures["histogram"] = torch.bincount(seen, minlength=NUM_CLASSES).tolist()
    if labels is not None:
        right = (seen == labels.cpu()).double()
        per_class = [right[labels.cpu() == digit] for digit in range(NUM_CLASSES)]
        figures["accuracy"] = float(right.mean())
        figures["accuracy_per_class"] = [float(part.mean()) if len(part) else None for part in per_class]
    if memorisation and reference.train is not None and reference.test_to_train is not None:
        distance, _ = nearest(images.to(reference.train.device), reference.train)
        figures["nearest_train"] = float(distance.mean())
        figures["nearest_train_ratio"] = float(distance.mean() / reference.test_to_train.mean())
        figures["close_to_train"] = float((distance < reference.test_to_train.quantile(CLOSE)).double().mean())
    return figures
