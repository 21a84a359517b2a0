"""The settings of the commands that train."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from ldm_ray.settings import recipes
from ldm_ray.settings.diffusion import (
    BETA_SCHEDULES,
    BETAS,
    MAX_BLOCKS,
    MAX_HIDDEN,
    NUM_BLOCKS,
    PREDICTION_TYPES,
    SPACES,
    check_tables,
)
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.gpu_share import accelerator_option, gpus_option
from ldm_ray.settings.limits import MAX_CLASSES, MAX_SEED
from ldm_ray.settings.options import Config, option
from ldm_ray.settings.shared import CACHE_HELP, DATASET_HELP, device_option


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """What every training command shares. What has neither a default here nor ``| None`` has that of its recipe."""

    recipe_table: ClassVar[recipes.Table]

    dataset: str = option("auto", DATASET_HELP, resume="free")  # a resume compares the images themselves
    cache_dir: str | None = option(None, CACHE_HELP, resume="free")
    outdir: str | None = option(
        None, "where everything is written, a folder of all nodes or s3://… [$SCRATCH, else ./outputs]", resume="free"
    )
    only_digit: int | None = option(None, "train on one class alone, by number", low=0, high=MAX_CLASSES - 1)
    recipe: str = option("best", "where the defaults of the settings named after it come from", choices=recipes.RECIPES)
    epochs: int = option(None, "passes over the training images", low=1, resume="free")
    batch_size: int = option(None, "images a step, over all workers together", low=1)
    lr: float = option(None, "largest learning rate", above=0, high=10)
    lr_schedule: str = option(None, "cosine: a warm-up, then down to 0; constant", choices=("cosine", "constant"))
    weight_decay: float = option(0.0, "weight decay of AdamW", low=0, high=10)
    seed: int = option(42, "everything random follows from it", low=0, high=MAX_SEED)
    device: str | None = device_option(resume="free")
    amp: bool = option(False, "mixed precision: bfloat16, or float16 on a GPU without it")
    grad_clip: float = option(1.0, "largest gradient norm; 0 = no clipping", low=0)
    val_fraction: float = option(0.05, "share of the images held out for the validation loss", above=0, below=1)
    early_stopping_patience: int = option(
        0, "stop after so many epochs without a better validation loss; 0 = never", low=0, resume="free"
    )
    num_workers: str = option(
        "1", "training workers: a number, or MIN-MAX to go on with what the cluster has", resume="free"
    )
    encode_workers: int | None = option(
        None, "workers that read and encode images [all that the GPUs take, or one per CPU core]", low=1,
        resume="free",
    )  # fmt: skip
    gpus_per_worker: float | None = gpus_option("an encoding or training worker")
    accelerator_type: str | None = accelerator_option()
    checkpoint_every: int = option(1, "epochs between checkpoints", low=1, resume="free")
    max_failures: int = option(3, "restarts after a lost worker before giving up", low=0, resume="free")
    auto_resume: bool = option(False, "go on with the newest run of these settings, if there is one", resume="free")
    generate_images: bool = option(False, "write a picture to samples/ after each epoch", resume="free")
    space, evaluate_every = "latent", 0  # a denoiser's alone

    def defaults(self) -> dict[str, Any]:
        return recipes.defaults(self.recipe_table, self.recipe, self.space)

    @classmethod
    def default_text(cls, field: dataclasses.Field) -> str:
        row = cls.recipe_table.get(field.name)
        return recipes.stated(row) if row else super().default_text(field)

    def writes(self, epoch: int) -> bool:
        """Whether a file of the epoch's own is written, other than at the end."""
        return epoch % self.checkpoint_every == 0 or self.evaluates(epoch)

    def evaluates(self, epoch: int) -> bool:
        """Whether the epoch is measured beside training."""
        return bool(self.evaluate_every) and (epoch % self.evaluate_every == 0 or epoch == self.epochs)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.worker_range()

    def worker_range(self) -> tuple[int, int]:
        """(smallest, largest) number of training workers."""
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", self.num_workers)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high:
            raise ConfigError(f"--num-workers is a number from 1, or MIN-MAX such as 1-4, not {self.num_workers!r}")
        if self.batch_size < high:
            raise ConfigError(f"--batch-size {self.batch_size} is less than one image for each of {high} workers")
        return low, high


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(RunConfig):
    """``python -m ldm_ray.train_autoencoder``"""

    recipe_table = recipes.AUTOENCODER
    model: str = option("mlp", "which autoencoder", choices=("conv", "mlp"))
    latent_dim: int = option(16, "numbers per image", low=1, high=1024)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """``python -m ldm_ray.train``"""

    recipe_table = recipes.DENOISER
    space: str = option(
        "latent", "what is diffused: an autoencoder's latents, or pixels by a U-Net, to compare with", choices=SPACES
    )
    ae_ckpt: str | None = option(
        None, "autoencoder checkpoint; its type is read from it [the newest found]", resume="free"
    )
    ae_ckpt_dir: str | None = option(
        None, "where to look for an autoencoder, Conv before MLP [the output directory]", resume="free"
    )
    num_train_timesteps: int = option(1000, "diffusion timesteps T", flag="T", low=2, high=100_000)
    beta_start: float = option(None, "noise variance of the first timestep", above=0, below=1)
    beta_end: float = option(None, "noise variance of the last timestep", above=0, below=1)
    beta_schedule: str = option(
        None,
        "shape of the noise schedule; linear where a beta or --prediction-type epsilon is given; squaredcos_cap_v2 "
        "goes by T alone",
        choices=BETA_SCHEDULES,
    )
    prediction_type: str = option(
        None, "what the denoiser learns: the noise, v, or x0 (sample)", choices=PREDICTION_TYPES
    )
    hidden_dim: int = option(
        None, "width of the denoiser; of the U-Net, its channels at full resolution", low=8, high=MAX_HIDDEN
    )
    num_blocks: int = option(
        NUM_BLOCKS, "residual blocks of the denoiser of latents, two FiLM layers each", low=1, high=MAX_BLOCKS
    )
    label_dropout: float = option(0.1, "share of labels hidden in training, for guidance", low=0, high=1)
    whiten: bool = option(None, "train on latents of unit covariance; otherwise as the encoder gives them")
    stratified: bool = option(None, "spread each batch evenly over the timesteps; otherwise at random")
    ema_decay: float = option(None, "decay of the averaged weights that sampling uses; 0 = none", low=0, below=1)
    evaluate_every: int = option(
        0, "epochs between measurements of FD-LeNet beside training, of which the best is best.pt; 0 = none", low=0,
        resume="free",
    )  # fmt: skip
    evaluate_samples: int = option(5000, "images of each of them", low=6, high=1_000_000, resume="free")
    samples_per_epoch: int = option(16, "pictures in a --generate-images grid", low=1, high=4096, resume="free")

    def __post_init__(self) -> None:
        if self.beta_schedule is None and (self.beta_start or self.beta_end or self.prediction_type == "epsilon"):
            object.__setattr__(self, "beta_schedule", "linear")  # ε tells nothing of x0 where ᾱ is next to 0
        super().__post_init__()
        if self.beta_schedule == "squaredcos_cap_v2" and (self.beta_start, self.beta_end) != BETAS:
            raise ConfigError(
                f"--beta-start {self.beta_start:g} and --beta-end {self.beta_end:g} say nothing to --beta-schedule "
                "squaredcos_cap_v2, which goes by T alone; leave them out, or take linear or scaled_linear"
            )
        if self.beta_end < self.beta_start:
            raise ConfigError(f"--beta-end {self.beta_end:g} is below --beta-start {self.beta_start:g}")
        if self.space == "pixel":
            for flag, value in (("ae-ckpt", self.ae_ckpt), ("ae-ckpt-dir", self.ae_ckpt_dir), ("whiten", self.whiten)):
                if value:
                    raise ConfigError(f"--{flag} belongs to --space latent; --space pixel has no autoencoder")
            if self.num_blocks != NUM_BLOCKS:
                raise ConfigError("--num-blocks belongs to --space latent; the U-Net of --space pixel has one shape")
        else:
            check_tables(self.num_train_timesteps, self.num_blocks, self.hidden_dim)
