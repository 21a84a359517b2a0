"""Options that several commands have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ldm_ray.settings.options import Config, option

DEVICES = ("cuda", "mps", "cpu")
DATASET_HELP = (
    "hub id (ylecun/mnist), folder of Parquet files or of PNGs by class, 'digits' (embedded, no network) or 'auto': "
    "the hub's MNIST, or the embedded digits where the hub cannot be reached"
)
CACHE_HELP = "where the hub's files are kept [$SLURM_TMPDIR, else ./hf_cache]"


def device_option(default: str = "the best there is", **rules: Any) -> Any:
    """A field with the type of device. default: what is taken where none is named, in words."""
    return option(None, f"cuda, mps or cpu [{default}]", choices=DEVICES, **rules)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """Which checkpoint a command works with: see ``checkpoints.choose``."""

    ckpt: str | None = option(None, "denoiser checkpoint [the newest under $SCRATCH, else ./outputs, or --outdir]")
    ae_ckpt: str | None = option(None, "autoencoder checkpoint [the one inside; for existing files, the one found]")
    outdir: str | None = option(None, "where to look for checkpoints [$SCRATCH, else ./outputs]")
    force: bool = option(False, "take an --ae-ckpt other than the one trained with")
