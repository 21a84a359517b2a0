"""Trains a latent diffusion model: images → latents → denoiser, on Ray.

  python -m ldm_ray.train                                  everything from nothing
  python -m ldm_ray.train --dataset FOLDER --ae-ckpt ae.pt --generate-images
  python -m ldm_ray.train --auto-resume                    go on where the last run stopped
  python -m ldm_ray.train --only-digit 7 --num-workers 2
  python -m ldm_ray.train --space pixel                    a U-Net on the pixels themselves, to compare with

Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and stop; the exit code is then 128 + the signal's number.
"""

from __future__ import annotations

import sys

if not __package__:  # python ldm_ray/train.py
    __import__("as_file")

from collections.abc import Sequence

from ldm_ray.settings.training import TrainConfig
from ldm_ray.terminal import cli, flags

PROG = "python -m ldm_ray.train"


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    config = flags.parse_config(TrainConfig, flags.Parser(prog=PROG, description=__doc__), given)
    from ldm_ray.distributed.pipeline import train

    return cli.close(train(config), PROG, "python -m ldm_ray.infer --ckpt", given, config)


if __name__ == "__main__":
    cli.run(main, PROG)
