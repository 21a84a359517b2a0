"""What a run is: frozen dataclasses, checked once when they are made.

Every command-line flag, its default, its bounds and its help text is a field here and nowhere else;
``cli.py`` turns the fields into flags and ``train --config`` reads them from JSON.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.gpu_share import accelerator_option, gpus_option
from ldm_ray.settings.limits import MAX_CLASSES
from ldm_ray.settings.options import Config, by_recipe, option

MAX_SEED = 2**32 - 1
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SAMPLERS = ("dpmpp_2m_sde", "unipc", "dpmpp_2m", "ddim", "ddpm")
MAX_BLOCKS, MAX_HIDDEN = 64, 8192
EMBEDDING_DIM = 256
MAX_TABLES = 2**26  # numbers
MAX_PARAMETERS = 3 * 2**26  # of a network that is read again
NUM_BLOCKS = 4  # of the denoiser, as published
GUIDANCE_SCALE = 2.75  # chosen with its start by measurement: docs/sampling.md
SPACINGS = ("leading", "trailing", "linspace", "logsnr", "karras")
DATASET_HELP = (
    "hub id (ylecun/mnist), folder of Parquet files or of PNGs by class, 'digits' (embedded, no network) or 'auto': "
    "the hub's MNIST, or the embedded digits where the hub cannot be reached"
)
CACHE_HELP = "where the hub's files are kept [$SLURM_TMPDIR, else ./hf_cache]"
BETAS = (1e-4, 2e-2)  # published
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
RECIPES = ("best", "classic")
SPACES = ("latent", "pixel")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """What every training command shares."""

    dataset: str = option("auto", DATASET_HELP, resume="free")  # a resume compares the images themselves
    cache_dir: str | None = option(None, CACHE_HELP, kind=str, resume="free")
    outdir: str | None = option(
        None,
        "where everything is written, a folder of all nodes or s3://… [$SCRATCH, else ./outputs]",
        kind=str,
        resume="free",
    )
    only_digit: int | None = option(None, "train on one class alone, by number", kind=int, low=0, high=MAX_CLASSES - 1)
    recipe: str = option("best", "where the defaults of the settings named after it come from", choices=RECIPES)
    epochs: int = by_recipe("passes over the training images", {"best": 60, "classic": 20}, low=1, resume="free")
    batch_size: int = by_recipe("images a step, over all workers together", {"best": 512, "classic": 128}, low=1)
    lr: float = by_recipe("largest learning rate", {"best": 2e-3, "classic": 2e-4}, above=0, high=10)
    lr_schedule: str = by_recipe(
        "cosine: a warm-up, then down to 0; constant",
        {"best": "cosine", "classic": "constant"},
        choices=("cosine", "constant"),
    )
    weight_decay: float = option(0.0, "weight decay of AdamW", low=0, high=10)
    seed: int = option(42, "everything random follows from it", low=0, high=MAX_SEED)
    device: str | None = option(
        None, "cuda, mps or cpu [the best there is]", kind=str, choices=("cuda", "mps", "cpu"), resume="free"
    )
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
        None, "workers that read and encode images [all that the GPUs take, or one per CPU core]", kind=int, low=1,
        resume="free",
    )  # fmt: skip
    gpus_per_worker: float | None = gpus_option("an encoding or training worker")
    accelerator_type: str | None = accelerator_option()
    checkpoint_every: int = option(1, "epochs between checkpoints", low=1, resume="free")
    max_failures: int = option(3, "restarts after a lost worker before giving up", low=0, resume="free")
    auto_resume: bool = option(False, "go on with the newest run of these settings, if there is one", resume="free")
    generate_images: bool = option(False, "write a picture to samples/ after each epoch", resume="free")
    evaluate_every = 0  # a denoiser's alone

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

    model: str = option("mlp", "which autoencoder", choices=("conv", "mlp"))
    latent_dim: int = option(16, "numbers per image", low=1, high=1024)
    epochs: int = by_recipe("passes over the training images", {"best": 40, "classic": 20}, low=1)
    batch_size: int = by_recipe("images a step, over all workers together", {"best": 128, "classic": 128}, low=1)
    lr: float = by_recipe("largest learning rate", {"best": 4e-3, "classic": 1e-3}, above=0, high=10)
    lr_schedule: str = by_recipe(
        "cosine: a warm-up, then down to 0; constant",
        {"best": "cosine", "classic": "cosine"},
        choices=("cosine", "constant"),
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """``python -m ldm_ray.train``"""

    space: str = option(
        "latent", "what is diffused: an autoencoder's latents, or pixels by a U-Net, to compare with", choices=SPACES
    )
    epochs: int = by_recipe(
        "passes over the training images", {"best": 60, "classic": 20, "best, pixel": 20}, low=1, resume="free"
    )
    batch_size: int = by_recipe(
        "images a step, over all workers together", {"best": 512, "classic": 128, "best, pixel": 128}, low=1
    )
    lr: float = by_recipe(
        "largest learning rate", {"best": 2e-3, "classic": 2e-4, "best, pixel": 1e-3}, above=0, high=10
    )
    ae_ckpt: str | None = option(
        None, "autoencoder checkpoint; its type is read from it [the newest found]", kind=str, resume="free"
    )
    ae_ckpt_dir: str | None = option(
        None, "where to look for an autoencoder, Conv before MLP [the output directory]", kind=str, resume="free"
    )
    num_train_timesteps: int = option(1000, "diffusion timesteps T", flag="T", low=2, high=100_000)
    beta_start: float = by_recipe(
        "noise variance of the first timestep", {"best": BETAS[0], "classic": BETAS[0]}, above=0, below=1
    )
    beta_end: float = by_recipe(
        "noise variance of the last timestep", {"best": BETAS[1], "classic": BETAS[1]}, above=0, below=1
    )
    beta_schedule: str = by_recipe(
        "shape of the noise schedule; linear where a beta or --prediction-type epsilon is given; squaredcos_cap_v2 "
        "goes by T alone",
        {"best": "squaredcos_cap_v2", "classic": "linear", "best, pixel": "linear"},
        choices=BETA_SCHEDULES,
    )
    prediction_type: str = by_recipe(
        "what the denoiser learns: the noise, v, or x0 (sample)",
        {"best": "v_prediction", "classic": "epsilon"},
        choices=PREDICTION_TYPES,
    )
    hidden_dim: int = by_recipe(
        "width of the denoiser; of the U-Net, its channels at full resolution",
        {"best": 256, "classic": 256, "best, pixel": 32, "classic, pixel": 32},
        low=8,
        high=MAX_HIDDEN,
    )
    num_blocks: int = option(
        NUM_BLOCKS, "residual blocks of the denoiser of latents, two FiLM layers each", low=1, high=MAX_BLOCKS
    )
    label_dropout: float = option(0.1, "share of labels hidden in training, for guidance", low=0, high=1)
    whiten: bool = by_recipe(
        "train on latents of unit covariance; otherwise as the encoder gives them",
        {"best": True, "classic": False, "best, pixel": False},
    )
    stratified: bool = by_recipe(
        "spread each batch evenly over the timesteps; otherwise at random", {"best": True, "classic": False}
    )
    ema_decay: float = by_recipe(
        "decay of the averaged weights that sampling uses; 0 = none", {"best": 0.999, "classic": 0.0}, low=0, below=1
    )
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
            for flag, given in (("ae-ckpt", self.ae_ckpt), ("ae-ckpt-dir", self.ae_ckpt_dir), ("whiten", self.whiten)):
                if given:
                    raise ConfigError(f"--{flag} belongs to --space latent; --space pixel has no autoencoder")
            if self.num_blocks != NUM_BLOCKS:
                raise ConfigError("--num-blocks belongs to --space latent; the U-Net of --space pixel has one shape")
        else:
            check_tables(self.num_train_timesteps, self.num_blocks, self.hidden_dim)


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(Config):
    """How images are sampled, but for guidance: what every command that makes images shares."""

    sampler: str = option(
        "dpmpp_2m_sde",
        "dpmpp_2m_sde (fresh noise in every step), unipc, dpmpp_2m, ddim, or ddpm: the published one, by default over "
        "every timestep",
        choices=SAMPLERS,
    )
    num_inference_steps: int | None = option(
        None,
        "denoising steps, up to the model's T [dpmpp_2m_sde: 10; unipc: 9; dpmpp_2m: 8; ddim: 20; ddpm: T]",
        kind=int,
        low=1,
    )
    timestep_spacing: str | None = option(None, "which timesteps those are [trailing]", kind=str, choices=SPACINGS)
    eta: float = option(0.0, "ddim's noise: 0 = none, 1 = as much as ddpm", low=0, high=1)
    guidance_start: float = option(
        0.9, "share of the steps before guidance sets in; 0 = every step is guided", low=0, below=1
    )
    precision: str = option(
        "fp32",
        "of the denoiser's large matrices; bf16 makes many images faster where the processor has it, few slower, and "
        "other bytes",
        choices=("fp32", "bf16"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta and self.sampler != "ddim":
            raise ConfigError(f"--eta {self.eta:g} belongs to --sampler ddim; {self.sampler} has none")

    def sampling_at(self, guidance_scale: float) -> SamplingConfig:
        """These settings alone, without those of a command."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplerConfig)}
        return SamplingConfig(**found, guidance_scale=guidance_scale)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(SamplerConfig):
    """How images are sampled."""

    guidance_scale: float = option(
        GUIDANCE_SCALE, "classifier-free guidance, in the steps after --guidance-start; 1 = off", low=0, high=20
    )

    @property
    def sampling(self) -> SamplingConfig:
        """These settings alone, without those of a command."""
        return self.sampling_at(self.guidance_scale)


@dataclass(frozen=True, kw_only=True)
class InferConfig(SamplingConfig):
    """``python -m ldm_ray.infer``"""

    ckpt: str | None = option(None, "denoiser checkpoint [the newest under the output directory]", kind=str)
    ae_ckpt: str | None = option(
        None, "autoencoder checkpoint [the one inside; for existing files, the one found]", kind=str
    )
    outdir: str | None = option(None, "where to look for checkpoints [$SCRATCH, else ./outputs]", kind=str)
    num_images: int = option(64, "how many", low=1, high=100_000)
    output: str = option("generated.png", "the picture to write")
    digit: str | None = option(None, "one class alone, by number or name [each in turn]", kind=str)
    seed: int = option(42, "image i has seed + i", low=0, high=MAX_SEED)
    device: str | None = option(None, "cuda, mps or cpu [the best there is]", kind=str, choices=("cuda", "mps", "cpu"))
    show_process: bool = option(False, "also write the denoising, as a strip and as a GIF")
    process_steps: int = option(10, "pictures in the strip, one a step at most", low=2, high=1000)
    force: bool = option(False, "take an --ae-ckpt other than the one trained with")


def check_tables(timesteps: int, num_blocks: int, hidden_dim: int, embedding_dim: int = EMBEDDING_DIM) -> None:
    """ConfigError unless a denoiser's tables for sampling, T × 2·blocks × 2·hidden numbers, can be made quickly."""
    size = 4 * timesteps * num_blocks * hidden_dim
    if not (1 <= num_blocks <= MAX_BLOCKS and 1 <= hidden_dim <= MAX_HIDDEN) or size > MAX_TABLES:
        raise ConfigError(
            f"T {timesteps} × {num_blocks} blocks × hidden size {hidden_dim}: at most {MAX_BLOCKS} blocks, a hidden "
            f"size of {MAX_HIDDEN}, and {MAX_TABLES // 4:,} for the product are possible"
        )
    if 2 * num_blocks * hidden_dim * (hidden_dim + 2 * embedding_dim) > MAX_PARAMETERS:
        raise ConfigError(
            f"{num_blocks} blocks of hidden size {hidden_dim} have more than {MAX_PARAMETERS:,} weights, the most that "
            "a checkpoint may have"
        )
    if size * embedding_dim > MAX_TABLES * 2 * EMBEDDING_DIM:
        raise ConfigError(f"an embedding of {embedding_dim} numbers is too long for tables of that size")


def canonical(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of a denoiser's settings that have an effect: a squaredcos_cap_v2 schedule goes by T alone."""
    idle = ("beta_start", "beta_end") if settings.get("beta_schedule") == "squaredcos_cap_v2" else ()
    return {name: value for name, value in settings.items() if name not in idle}


MOST_LISTED = 1000  # numbers of a text such as 0-9


def seeds_in(text: str) -> list[int]:
    """The different seeds of ``--seeds`` with commas between, ranges among them, such as 0-4,9. ConfigError."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,10})(?:\s*-\s*(\d{1,10}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= MAX_SEED or last - first >= MOST_LISTED:
            raise ConfigError(
                f"--seeds is numbers from 0 to {MAX_SEED} and rising ranges with commas between, such as 0-4,9, at "
                f"most {MOST_LISTED} of them; {part.strip()!r:.60} is neither"
            )
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds) or len(seeds) > MOST_LISTED:
        raise ConfigError(f"--seeds is different numbers, at most {MOST_LISTED} of them, not {text!r:.60}")
    return seeds


def listed(flag: str, text: str, pattern: str, high: float) -> list[float]:
    """The different numbers of a text such as 0,1,2. ConfigError unless each fits the pattern and is at most high."""
    parts = [part.strip() for part in text.split(",")]
    values = [float(part) for part in parts if re.fullmatch(pattern, part, re.ASCII)]
    if len(values) < len(parts) or max(values) > high or len(set(values)) < len(values):
        raise ConfigError(
            f"{flag} is different numbers from 0 to {high} with commas between, such as 1,2, not {text!r}"
        )
    return values
