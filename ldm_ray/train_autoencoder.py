"""Trains an autoencoder: 28×28 images to a few numbers and back, on Ray.

  python -m ldm_ray.train_autoencoder --model conv
  python -m ldm_ray.train_autoencoder --model mlp --dataset FOLDER --generate-images
  python -m ldm_ray.train_autoencoder --model mlp --auto-resume

Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and stop; the exit code is then 128 + the signal's number.
"""

from __future__ import annotations

import sys

if not __package__:  # python ldm_ray/train_autoencoder.py
    __import__("as_file")

from collections.abc import Sequence

from ldm_ray.settings.training import AutoencoderConfig
from ldm_ray.terminal import cli, flags

PROG = "python -m ldm_ray.train_autoencoder"


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    config = flags.parse_config(AutoencoderConfig, flags.Parser(prog=PROG, description=__doc__), given)
    from ldm_ray.distributed.pipeline import train_autoencoder

    return cli.close(train_autoencoder(config), PROG, "python -m ldm_ray.train --ae-ckpt", given, config)


if __name__ == "__main__":
    cli.run(main, PROG)
