"""Maps the latents of test images, coloured by class, as t-SNE lays them out; two autoencoders side by side.

python -m ldm_ray.tsne --ae-ckpt conv.pt mlp.pt          tsne.png, tsne.csv and tsne.json
python -m ldm_ray.tsne --ckpt latest.pt                  also images that a denoiser makes
python -m ldm_ray.tsne --ae-ckpt mlp.pt --samples 2000 --perplexity 50 --output mlp.png

What the scores are: docs/latents.md.
"""

from __future__ import annotations

if not __package__:  # python ldm_ray/tsne.py
    __import__("as_file")

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ldm_ray.settings.latents import TsneConfig
from ldm_ray.terminal import cli, flags
from ldm_ray.terminal.progress import Progress

if TYPE_CHECKING:
    import numpy as np

    from ldm_ray.latents.cloud import Clouds

PROG = "python -m ldm_ray.tsne"
log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    config = flags.parse_config(TsneConfig, flags.Parser(prog=PROG, description=__doc__), argv)
    output = cli.picture_path(config.output)
    import numpy as np

    from ldm_ray.checkpoints.checkpoint import versions
    from ldm_ray.files.paths import write_bytes
    from ldm_ray.latents.cloud import gather
    from ldm_ray.latents.maps import tsne
    from ldm_ray.latents.picture import Panel, draw

    found = gather(config)
    parts = [found.test] + ([found.made] if found.made else [])
    labels = np.concatenate([part.labels.numpy() for part in parts])
    images = np.concatenate([part.images[:, 0].numpy() for part in parts])
    maps, panels = [], []
    told: list[dict[str, Any]] = []
    for cloud in found.clouds:
        kind, path = cloud.autoencoder.codec.kind, cloud.autoencoder.path
        log.info("%s, %d points of %d numbers: %s", kind, len(cloud.latents), cloud.latents.shape[1], path)
        with Progress("laying them out"):
            points = tsne(cloud.latents.double().numpy(), config.perplexity, config.seed)
        with Progress("scoring the map"):
            each = score(found, cloud.latents.numpy(), points)
        told.append({"type": kind, "path": path, "sha256": cloud.autoencoder.sha256, "scores": each})
        title = f"{kind}, {cloud.latents.shape[1]} numbers\n" + "\n".join(lines(each))
        panels.append(Panel(title=title, points=points, labels=labels, images=images, tests=len(found.test)))
        maps.append(points)
    data = {"name": found.source.name, "revision": found.source.revision, "test_images": len(found.test)}
    about: dict[str, Any] = {"autoencoders": told, "dataset": data, "notes": found.notes}
    about |= {"settings": config.to_dict(), "versions": versions()}
    if found.denoiser:
        about["checkpoint"] = {"path": found.denoiser.path, "sha256": found.denoiser.sha256}
    scores_file, table = output.with_suffix(".json"), output.with_suffix(".csv")
    write_bytes(scores_file, json.dumps(about, indent=1).encode())
    write_bytes(table, table_of(found, maps).encode())
    text = {"scores": json.dumps([row["scores"] for row in told]), "seed": str(config.seed)}
    write_bytes(output, draw(panels, found.class_names, config.thumbnails, text))
    for row in told:
        print(f"{row['type']}  {row['path']}", *lines(row["scores"]), sep="\n  ")
    for note in found.notes:
        print(f"NOTE: {note}")
    print(f"picture     {output}\npoints      {table}\nscores      {scores_file}")
    return 0


def score(found: Clouds, latents: np.ndarray, points: np.ndarray) -> dict[str, dict[str, Any]]:
    """Of the test images, and of those made: the scores of their latents and of their map."""
    from ldm_ray.latents.maps import scores

    count = len(found.test)
    parts = {"test": (slice(0, count), found.test.labels)}
    if found.made:
        parts["generated"] = (slice(count, None), found.made.labels)
    return {
        name: {"latents": scores(latents[rows], labels.numpy()), "map": scores(points[rows], labels.numpy())}
        for name, (rows, labels) in parts.items()
    }


def lines(scores: dict[str, dict[str, Any]]) -> list[str]:
    """The scores in words."""
    return [
        f"{name} {space}: "
        + (f"silhouette {s['silhouette']:.3f}, Calinski–Harabasz {s['calinski_harabasz']:.0f}" if s else "one class")
        for name, spaces in scores.items()
        for space, s in spaces.items()
    ]


def table_of(found: Clouds, maps: Sequence[np.ndarray]) -> str:
    """A line for each point: which autoencoder, test or generated, position or seed, label, class, x, y."""
    import csv
    import io

    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    rows.writerow(["autoencoder", "type", "kind", "number", "label", "class", "x", "y"])
    for which, (cloud, points) in enumerate(zip(found.clouds, maps, strict=True)):
        at = iter(points.tolist())
        for kind, part in (("test", found.test), ("generated", found.made)):
            if part is not None:
                for number, label in zip(part.numbers.tolist(), part.labels.tolist(), strict=True):
                    x, y = next(at)
                    name = found.class_names[label]
                    rows.writerow([which, cloud.autoencoder.codec.kind, kind, number, label, name, x, y])
    return buffer.getvalue()


if __name__ == "__main__":
    cli.run(main, PROG)
