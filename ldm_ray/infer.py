"""Makes images with a trained checkpoint and writes them as one picture.

python -m ldm_ray.infer                                  the newest checkpoint, 64 images
python -m ldm_ray.infer --ckpt latest.pt --digit 7 --num-images 16 --output sevens.png
python -m ldm_ray.infer --ckpt latest.pt --num-images 8 --show-process
"""

from __future__ import annotations

if not __package__:  # python ldm_ray/infer.py
    __import__("as_file")

import logging
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from ldm_ray.files.paths import outdir
from ldm_ray.settings.errors import CheckpointError, ConfigError
from ldm_ray.settings.limits import MAX_SEED
from ldm_ray.settings.sampling import InferConfig
from ldm_ray.terminal import cli, flags
from ldm_ray.terminal.words import counted

PROG = "python -m ldm_ray.infer"
PROCESS_IMAGES = 8
GIF_FRAMES = 40
log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    config = flags.parse_config(InferConfig, flags.Parser(prog=PROG, description=__doc__), argv)
    output = cli.picture_path(config.output)
    if config.seed + config.num_images - 1 > MAX_SEED:
        raise ConfigError(f"--seed {config.seed} with {config.num_images} images goes beyond the last seed, {MAX_SEED}")
    from ldm_ray.checkpoints.choose import chosen
    from ldm_ray.data.classes import class_of
    from ldm_ray.data.images import save_grid
    from ldm_ray.devices.device import pick_device
    from ldm_ray.engine.generator import Generator

    device = pick_device(config.device)
    model = chosen(config, outdir(config.outdir))
    generator, only = Generator.of(model, device), model.only_digit
    digit = only if config.digit is None else class_of(config.digit, generator.class_names)
    if only not in (None, digit):
        raise CheckpointError(f"{model.path} was trained on digit {only} alone, not on {config.digit}")
    seeds = [config.seed + i for i in range(config.num_images)]
    labels = generator.in_turn(config.num_images, digit)
    what = counted(config.num_images, "image")
    with generator.progress(f"making {what}", config.num_images, config.sampling) as progress:
        images = generator(seeds, labels, config.sampling, progress.watch)
    told = {
        "checkpoint": generator.sha256,
        "fingerprint": generator.fingerprint_in(config.precision),
        "seed": config.seed,
    }
    text = {key: str(value) for key, value in (told | config.sampling.to_dict()).items() if value is not None}
    save_grid(images, output, text=text)
    print(f"{what} from {model.path} in {output}")
    if config.show_process:
        count = min(PROCESS_IMAGES, config.num_images)
        for made in show_process(generator, seeds[:count], labels[:count], config, output):
            print(f"denoising of the first {count} in {made}")
    return 0


def show_process(generator: Any, seeds: list[int], labels: list[int], config: InferConfig, output: Path) -> list[Path]:
    """Writes the strip (an image a row, least noise at the right) and the GIF."""
    import torch

    from ldm_ray.data.images import grid, save_gif, save_grid

    seen: dict[tuple[int, int], Any] = {}  # by step and tile
    with generator.progress("showing the denoising", len(seeds), config.sampling) as progress:

        def keep(first: int, step: int, x0: Any) -> None:
            seen[step, first] = x0
            progress.watch(first, step, x0)

        generator(seeds, labels, config.sampling, keep)
    frames = [torch.cat([seen[key] for key in keys]) for _, keys in groupby(sorted(seen), key=itemgetter(0))]
    images = [generator.decode(frames[i]) for i in spread(len(frames), max(config.process_steps, GIF_FRAMES))]
    strip = [images[i] for i in spread(len(images), config.process_steps)]
    beside = output.with_name(f"{output.stem}_process.png"), output.with_name(f"{output.stem}_process.gif")
    save_grid(torch.stack(strip, dim=1).flatten(0, 1), beside[0], columns=len(strip))
    save_gif([grid(image, columns=4) for image in images], beside[1])
    return list(beside)


def spread(count: int, wanted: int) -> list[int]:
    """``wanted`` positions (or all, where there are fewer) evenly from the first to the last."""
    wanted = min(count, wanted)
    return [round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)]


if __name__ == "__main__":
    cli.run(main, PROG)
