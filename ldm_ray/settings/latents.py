"""The settings of the commands that look at a latent space."""

from __future__ import annotations

from dataclasses import dataclass

from ldm_ray.settings.limits import MAX_SEED
from ldm_ray.settings.lists import seeds_in
from ldm_ray.settings.options import option
from ldm_ray.settings.sampling import SamplingConfig
from ldm_ray.settings.shared import CACHE_HELP, DATASET_HELP, ModelConfig, device_option

SHEETS = ("interpolate", "traverse", "plane")

METHODS = ("linear", "spherical")


@dataclass(frozen=True, kw_only=True)
class ExploreConfig(ModelConfig, SamplingConfig):
    """``python -m ldm_ray.explore``"""

    sheet: str = option(
        "interpolate",
        "interpolate: from each seed and digit to the next; traverse: one latent with one number changed a row; "
        "plane: the plane that tells the digits apart",
        choices=SHEETS,
    )
    output: str = option("explore.png", "the picture to write")
    seeds: str = option("42", "image seeds, with commas between, and ranges such as 0-4")
    digits: str | None = option(
        None,
        "one for each seed in turn: classes by number or name with commas between, or none: unconditional "
        "[interpolate and plane: each in turn; traverse: the first]",
    )
    columns: int = option(11, "pictures in a row", low=2, high=100)
    method: str = option("spherical", "how to interpolate", choices=METHODS)
    span: float = option(3.0, "traverse: from minus to plus so many standard deviations", above=0, high=100)
    rows: int = option(32, "traverse: numbers of the latent, at most", low=1, high=1024)
    device: str | None = device_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_seeds()

    def image_seeds(self) -> list[int]:
        return seeds_in(self.seeds)


@dataclass(frozen=True, kw_only=True)
class TsneConfig(SamplingConfig):
    """``python -m ldm_ray.tsne``"""

    ae_ckpt: tuple[str, ...] | None = option(
        None, "autoencoder checkpoint, or two side by side [that of --ckpt, else the newest found]", many=2
    )
    ckpt: str | None = option(None, "denoiser checkpoint: also show images that it makes")
    dataset: str | None = option(None, f"whose test images [those of the checkpoint's own dataset]: {DATASET_HELP}")
    cache_dir: str | None = option(None, CACHE_HELP)
    outdir: str | None = option(None, "where to look for autoencoders [$SCRATCH, else ./outputs]")
    output: str = option("tsne.png", "the picture to write; .csv and .json of the same name go beside it")
    samples: int = option(5000, "test images, drawn where there are more; as many are made with --ckpt", low=4)
    perplexity: float = option(30.0, "neighbours that a point attends to, fewer than points", above=0, high=10_000)
    seed: int = option(42, "everything random follows from it; image i made has seed + i", low=0, high=MAX_SEED)
    thumbnails: bool = option(True, "show images where points cluster")
    device: str | None = device_option()
