"""Puts checkpoints side by side: diffusion of latents beside diffusion of pixels.

python -m ldm_ray.train && python -m ldm_ray.train --space pixel
python -m ldm_ray.compare                                    the newest of each
python -m ldm_ray.compare --ckpt latents.pt pixels.pt --dataset FOLDER
python -m ldm_ray.compare --ckpt a.pt b.pt --samples 0       speed and memory alone

Written: a table (comparison.md, comparison.json) and the same seeds by each of them (comparison.png).
"""

from __future__ import annotations

if not __package__:  # python ldm_ray/compare.py
    __import__("as_file")

import logging
from collections.abc import Sequence
from typing import Any

from ldm_ray.files.paths import AnyPath, cache_dir, outdir, to_path
from ldm_ray.settings.diffusion import SPACES
from ldm_ray.settings.errors import CheckpointError, ConfigError
from ldm_ray.settings.evaluation import CompareConfig
from ldm_ray.terminal import cli, flags
from ldm_ray.terminal.progress import Progress

PROG = "python -m ldm_ray.compare"
ROWS, COLUMNS = 8, 10  # of each checkpoint's images in the picture; classes at most
log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    config = flags.parse_config(CompareConfig, flags.Parser(prog=PROG, description=__doc__), argv)
    output = cli.folder_path(config.output)
    from ldm_ray.checkpoints import runs
    from ldm_ray.checkpoints.checkpoint import versions
    from ldm_ray.checkpoints.choose import named_or_newest
    from ldm_ray.data.images import encode_png
    from ldm_ray.devices.device import pick_device
    from ldm_ray.files.paths import write_bytes
    from ldm_ray.metrics import comparison
    from ldm_ray.metrics.picture import side_by_side

    base, device = outdir(config.outdir), pick_device(config.device)
    paths = [to_path(path) for path in config.ckpt or ()]
    paths = paths or [named_or_newest(None, base, space=space) for space in SPACES]
    loaded = [load_checked(path, base, config) for path in paths]
    own = real_images(loaded, paths, config) if config.samples else []
    for folder in (base, output):
        runs.check_writable(folder)
    rows: list[dict[str, Any]] = [comparison.facts(model, config.sampling) for model in loaded]
    for row, name, path, model in zip(rows, comparison.names_of(rows), paths, loaded, strict=True):
        log.info("%s, %s: speed and memory", name, path)
        row |= {"name": name, "path": str(path), "sha256": model.sha256}
        asked = (path, device.type, config.sampling, config.sizes(), config.repeats)
        with Progress(f"{name}: how fast it samples"):
            row |= comparison.apart(comparison.sampling_speed, *asked)
        with Progress(f"{name}: how fast it trains"):
            row |= comparison.apart(comparison.training_speed, path, device.type)
    panels = [(row["name"], *images_of(model, device, config)) for row, model in zip(rows, loaded, strict=True)]
    write_bytes(output / "comparison.png", encode_png(side_by_side(panels)))
    for row, path, model, (sources, notes) in zip(rows, paths, loaded, own, strict=False):
        row |= measured(model, path, device, config, sources)
        row["notes"] = notes + row["notes"]
    where = "\n".join(f"- {row['name']}: {row['path']}" for row in rows)
    every = dict.fromkeys(f"NOTE: {note}" for row in rows for note in row.get("notes", ()))
    text = "\n\n".join([comparison.table(rows), where, *every])
    about = {"settings": config.to_dict(), "device": device.type, "versions": versions()}
    write_bytes(output / "comparison.json", comparison.to_json(about | {"checkpoints": rows}))
    write_bytes(output / "comparison.md", (text + "\n").encode())
    print(f"{text}\n\nin {output}: comparison.md, comparison.json, and the same seeds by each in comparison.png")
    return 0


def load_checked(path: AnyPath, base: AnyPath, config: CompareConfig) -> Any:
    """A checkpoint that can be measured. CheckpointError when it cannot."""
    from ldm_ray.checkpoints.choose import load
    from ldm_ray.diffusion.samplers import plan_of
    from ldm_ray.engine.generator import check_precision

    found = load(path, search=[path.parent, base])
    plan_of(found.schedule, config.sampling, found.prediction_type)  # more steps than timesteps are refused here
    check_precision(config.precision, found.codec)
    if not found.info.get("config"):
        raise CheckpointError(f"{path} does not say how it was trained; compare takes checkpoints of this version")
    return found


def real_images(loaded: list[Any], paths: list[AnyPath], config: CompareConfig) -> list[tuple[list[Any], list[str]]]:
    """Of each checkpoint, ``load_own``. ConfigError where they were trained on different images and none are named."""
    from ldm_ray.data.recorded import load_own

    cache = cache_dir(config.cache_dir)
    own = [
        load_own(model.info, path, config.dataset, cache, model.only_digit)
        for path, model in zip(paths, loaded, strict=True)
    ]
    if len({sources[0].revision for sources, _ in own}) > 1:
        names = "; ".join(f"{path}: {sources[0].name}" for path, (sources, _) in zip(paths, own, strict=True))
        raise ConfigError(f"these checkpoints have different images ({names}): name those to compare with by --dataset")
    return own


def images_of(model: Any, device: Any, config: CompareConfig) -> tuple[Any, int]:
    """(ROWS images (N, 1, H, W) uint8 of each class, the number of columns: one for each class). The columns of a model
    of one digit all show that."""
    from ldm_ray.engine.generator import Generator

    generator = Generator.of(model, device)
    columns = min(COLUMNS, len(generator.labels))
    labels = generator.in_turn(columns) * ROWS
    with generator.progress("making the picture", len(labels), config.sampling) as progress:
        return generator(range(len(labels)), labels, config.sampling, progress.watch), columns


def measured(model: Any, path: AnyPath, device: Any, config: CompareConfig, sources: list[Any]) -> dict[str, Any]:
    """The quality of a checkpoint's images beside the real ones of ``sources``, and the floor beside it."""
    from ldm_ray.engine.generator import Generator
    from ldm_ray.metrics.evaluation import evaluate
    from ldm_ray.metrics.report import floor_of

    found, _ = evaluate(config.evaluation(str(path)), Generator.of(model, device), sources)
    kept = {"floors": found["floors"], "dataset": found["dataset"], "notes": found["notes"]}
    return {"quality": found["samples"][0], "floor": floor_of(found)[1]} | kept


if __name__ == "__main__":
    cli.run(main, PROG)
