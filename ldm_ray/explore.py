"""Shows a model's latent space as one picture: between images, along single numbers, over a plane.

python -m ldm_ray.explore --ckpt latest.pt                                  each digit into the next
python -m ldm_ray.explore --ckpt latest.pt --seeds 1,2,3 --digits 7         one seven into another
python -m ldm_ray.explore --ckpt latest.pt --sheet traverse --digits 3      a row for each number of a latent
python -m ldm_ray.explore --ckpt latest.pt --sheet plane --columns 20
"""

from __future__ import annotations

if not __package__:  # python ldm_ray/explore.py
    __import__("as_file")

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ldm_ray.files.paths import outdir
from ldm_ray.settings.errors import CheckpointError, ConfigError
from ldm_ray.settings.latents import ExploreConfig
from ldm_ray.terminal import cli, flags
from ldm_ray.terminal.words import counted

if TYPE_CHECKING:
    from torch import Tensor

    from ldm_ray.engine.generator import Generator

PROG = "python -m ldm_ray.explore"
Names = list[str]


def main(argv: Sequence[str] | None = None) -> int:
    config = flags.parse_config(ExploreConfig, flags.Parser(prog=PROG, description=__doc__), argv)
    output = cli.picture_path(config.output)
    from ldm_ray.checkpoints.choose import chosen
    from ldm_ray.data.images import encode_png, grid
    from ldm_ray.devices.device import pick_device
    from ldm_ray.engine.generator import Generator
    from ldm_ray.files.paths import write_bytes
    from ldm_ray.latents.labels import labelled

    device = pick_device(config.device)
    model = chosen(config, outdir(config.outdir))
    generator = Generator.of(model, device)
    labels = labels_of(config, generator)
    latents, rows, columns = sheet(config, generator, labels)
    told = {
        "checkpoint": generator.sha256,
        "fingerprint": generator.fingerprint_in(config.precision),
        "sheet": config.sheet,
    }
    text = {key: str(value) for key, value in (told | config.sampling.to_dict()).items() if value is not None}
    images = grid(generator.decode(latents.flatten(0, 1)), latents.shape[1])
    write_bytes(output, encode_png(labelled(images, rows, columns), text | {"seeds": config.seeds}))
    if config.sheet == "plane":
        print("beside the rows and above the columns: the places along the plane's axes, in standard deviations")
    else:
        print("\n".join(f"row {number + 1:>3}  {row}" for number, row in enumerate(rows)))
    print(f"{counted(latents.shape[0], 'row')} of {latents.shape[1]} images from {model.path} in {output}")
    return 0


def labels_of(config: ExploreConfig, generator: Generator) -> list[int | None]:
    """The classes asked for. ConfigError: unknown; CheckpointError: not the one that the model was trained on."""
    from ldm_ray.data.classes import classes_of

    only = generator.only_digit
    if config.digits is None:
        count = 1 if config.sheet == "traverse" or only is not None else len(generator.labels)
        return [*generator.in_turn(count)]
    if config.digits.strip().lower() == "none":
        return [None]
    labels: list[int | None] = [*classes_of(config.digits, generator.class_names)]
    if only is not None and set(labels) != {only}:
        raise CheckpointError(f"the model was trained on digit {only} alone, not on {config.digits}")
    return labels


def sheet(config: ExploreConfig, generator: Generator, labels: list[int | None]) -> tuple[Tensor, Names, Names]:
    """(whitened latents (R, S, D), what each row is, what each column is)."""
    from ldm_ray.latents import sheets

    seeds, sampling = config.image_seeds(), config.sampling
    ends = sheets.ends_of(seeds, labels)
    names = [f"{name_of(label, generator)}, seed {seed}" for seed, label in ends]
    shares = [i / (config.columns - 1) for i in range(config.columns)]
    if config.sheet == "interpolate":
        latents = sheets.between(generator, ends, config.columns, config.method, sampling)
        return latents, [f"{a} to {b}" for a, b in itertools.pairwise(names)], [f"{share:.0%}" for share in shares]
    if config.sheet == "plane":
        if len(seeds) > 1:
            raise ConfigError(f"--sheet plane takes one of --seeds, the first of those it goes by, not {config.seeds}")
        latents, right, up = sheets.over_plane(generator, seeds[0], labels, config.columns, sampling)
        return latents, [place(y) for y in up], [place(x) for x in right]
    if len(ends) > 1:
        raise ConfigError("--sheet traverse starts from one image: name one of --seeds and one of --digits")
    latents = sheets.along(generator, ends[0], config.columns, config.span, config.rows, sampling)
    values = [place(config.span * (2 * share - 1)) for share in shares]
    return latents, [f"{names[0]}: number {axis}" for axis in range(len(latents))], values


def place(value: float) -> str:
    """Where something is on an axis of standard deviations."""
    return "0" if abs(value) < 0.05 else f"{value:+.1f}"


def name_of(label: int | None, generator: Generator) -> str:
    return "none" if label is None else generator.class_names[label]


if __name__ == "__main__":
    cli.run(main, PROG)
