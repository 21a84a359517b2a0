"""What a run is: frozen dataclasses, checked once when they are made.

Every command-line flag, its default, its bounds and its help text is a field here and nowhere else;
``cli.py`` turns the fields into flags and ``train --config`` reads them from JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_ray.errors import ConfigError

MAX_SEED = 2**32 - 1
SAMPLERS = ("dpmpp_2m", "ddim", "ddpm")
SPACINGS = ("leading", "trailing", "linspace", "logsnr", "karras")
DATASET_HELP = (
    "hub id (ylecun/mnist), folder of Parquet files, 'digits' (embedded, no network) or 'auto': "
    "the hub's MNIST, or the embedded digits where the hub cannot be reached"
)
CACHE_HELP = "where the hub's files are kept [$SLURM_TMPDIR, else ./hf_cache]"


def option(default: Any, help: str, **rules: Any) -> Any:
    """A dataclass field with what its flag needs.

    rules: ``flag`` (name, when not the field's), ``kind`` (int, float, str or bool; the default's type
    otherwise), ``low``, ``high`` (inclusive), ``above``, ``below`` (exclusive), ``choices``, ``metavar``,
    ``resume`` ("free": may change between the stop and the resume of a run).
    """
    return dataclasses.field(default=default, metadata={"help": help, **rules})


def flag_of(field: dataclasses.Field) -> str:
    """The field's flag without dashes in front, for example ``batch-size``."""
    return field.metadata.get("flag", field.name.replace("_", "-"))


def kind_of(field: dataclasses.Field) -> type:
    """int, float, str or bool."""
    return field.metadata.get("kind") or type(field.default)


def check_value(field: dataclasses.Field, value: Any) -> Any:
    """The value in its field's type, or ConfigError with what is allowed."""
    if value is None and field.default is None:
        return None
    rules, kind, name = field.metadata, kind_of(field), f"--{flag_of(field)}"
    if kind is bool and not isinstance(value, bool):
        raise ConfigError(f"{name} is true or false, not {value!r}")
    if kind is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise ConfigError(f"{name} is a whole number, not {value!r}")
    if kind is float:
        given, value = value, math.nan
        if isinstance(given, (int, float)) and not isinstance(given, bool):
            with contextlib.suppress(OverflowError):  # a whole number too large for a float
                value = float(given)
        if not math.isfinite(value):
            raise ConfigError(f"{name} is a finite number, not {given!r}")
    if kind is str:
        if not isinstance(value, (str, int, Path)) or isinstance(value, bool) or str(value) == "":
            raise ConfigError(f"{name} is a text that is not empty, not {value!r}")
        value = str(value)
    if "choices" in rules and value not in rules["choices"]:
        raise ConfigError(f"{name} is one of {', '.join(map(str, rules['choices']))}, not {value!r}")
    low, high, above, below = (rules.get(k) for k in ("low", "high", "above", "below"))
    if (low is not None and value < low) or (above is not None and value <= above):
        raise ConfigError(f"{name} is {f'at least {low}' if low is not None else f'above {above}'}, not {value}")
    if (high is not None and value > high) or (below is not None and value >= below):
        raise ConfigError(f"{name} is {f'at most {high}' if high is not None else f'below {below}'}, not {value}")
    return value


@dataclass(frozen=True, kw_only=True)
class Config:
    """A group of settings that is checked when it is made; subclasses add the fields."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, check_value(field, getattr(self, field.name)))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "the configuration") -> Any:
        """Builds from flag names (``T``, ``batch-size``) or field names. ConfigError on unknown names."""
        return cls(**cls.by_field(values, source))

    @classmethod
    def by_field(cls, values: dict[str, Any], source: str) -> dict[str, Any]:
        """The values, unchecked, by the names of the fields. ConfigError on unknown names."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        by_flag = {flag_of(field).replace("-", "_"): name for name, field in fields.items()}
        found: dict[str, Any] = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            name = name if name in fields else by_flag.get(name, "")
            if not name:
                known = ", ".join(sorted(by_flag))
                raise ConfigError(f"{source} has an unknown setting {key!r}; known are: {known}")
            found[name] = value
        return found

    def differences(self, other: dict[str, Any]) -> list[str]:
        """What differs from a recorded run in the settings that a resume may not change."""
        return [
            f"--{flag_of(field)} {other[field.name]} then, {getattr(self, field.name)} now"
            for field in dataclasses.fields(self)
            if field.metadata.get("resume") != "free"
            and field.name in other
            and getattr(self, field.name) != other[field.name]
        ]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """What every training command shares."""

    dataset: str = option("auto", DATASET_HELP)
    cache_dir: str | None = option(None, CACHE_HELP, kind=str, resume="free")
    outdir: str | None = option(None, "where everything is written [$SCRATCH, else ./outputs]", kind=str, resume="free")
    only_digit: int | None = option(None, "train on one digit alone, 0-9", kind=int, low=0, high=9)
    epochs: int = option(20, "passes over the training images", low=1, resume="free")
    batch_size: int = option(128, "images per optimiser step, over all workers together", low=1)
    lr: float = option(2e-4, "learning rate", above=0, high=10)
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
        None, "workers that read and encode images [one per GPU, or per CPU core]", kind=int, low=1, resume="free"
    )
    checkpoint_every: int = option(1, "epochs between checkpoints", low=1, resume="free")
    max_failures: int = option(3, "restarts after a lost worker before giving up", low=0, resume="free")
    auto_resume: bool = option(False, "go on with the newest run of these settings, if there is one", resume="free")
    generate_images: bool = option(False, "write a picture to samples/ after each epoch", resume="free")

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
    lr: float = option(1e-3, "largest learning rate, after the warm-up and before the cosine decay", above=0, high=10)
    epochs: int = option(20, "passes over the training images", low=1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """``python -m ldm_ray.train``"""

    ae_ckpt: str | None = option(
        None, "autoencoder checkpoint; its type is read from it [the newest found]", kind=str, resume="free"
    )
    ae_ckpt_dir: str | None = option(
        None, "where to look for an autoencoder, Conv before MLP [the output directory]", kind=str, resume="free"
    )
    num_train_timesteps: int = option(1000, "diffusion timesteps T", flag="T", low=2, high=100_000)
    beta_start: float = option(1e-4, "noise variance of the first timestep", above=0, below=1)
    beta_end: float = option(2e-2, "noise variance of the last timestep", above=0, below=1)
    hidden_dim: int = option(256, "width of the denoiser", low=8, high=8192)
    label_dropout: float = option(0.1, "share of labels hidden in training, for guidance", low=0, high=1)
    ema_decay: float = option(0.999, "decay of the averaged weights that sampling uses", low=0, below=1)
    samples_per_epoch: int = option(16, "pictures in a --generate-images grid", low=1, high=4096, resume="free")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta_end < self.beta_start:
            raise ConfigError(f"--beta-end {self.beta_end:g} is below --beta-start {self.beta_start:g}")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Config):
    """How images are sampled: what every command that makes images shares."""

    sampler: str = option(
        "dpmpp_2m", "dpmpp_2m, ddim, or ddpm: the published one, by default over every timestep", choices=SAMPLERS
    )
    num_inference_steps: int | None = option(
        None, "denoising steps, up to the model's T [ddpm: T; ddim: 20; dpmpp_2m: 10]", kind=int, low=1
    )
    timestep_spacing: str | None = option(
        None, "which timesteps those are [dpmpp_2m: logsnr; others: trailing]", kind=str, choices=SPACINGS
    )
    eta: float = option(0.0, "ddim's noise: 0 = none, 1 = as much as ddpm", low=0, high=1)
    guidance_scale: float = option(1.0, "classifier-free guidance; 1 = off", low=0, high=20)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta and self.sampler != "ddim":
            raise ConfigError(f"--eta {self.eta:g} belongs to --sampler ddim; {self.sampler} has none")

    @property
    def sampling(self) -> SamplingConfig:
        """These settings alone, without those of a command."""
        return SamplingConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(SamplingConfig)})


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
    digit: int | None = option(None, "one digit alone, 0-9 [each in turn]", kind=int, low=0, high=9)
    seed: int = option(42, "image i has seed + i", low=0, high=MAX_SEED)
    device: str | None = option(None, "cuda, mps or cpu [the best there is]", kind=str, choices=("cuda", "mps", "cpu"))
    show_process: bool = option(False, "also write the denoising, as a strip and as a GIF")
    process_steps: int = option(10, "pictures in the strip", low=2, high=1000)
    force: bool = option(False, "take an --ae-ckpt other than the one trained with")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """``python -m ldm_ray.generate``"""

    ckpt: str | None = option(None, "denoiser checkpoint [the newest under $SCRATCH, else ./outputs]", kind=str)
    ae_ckpt: str | None = option(
        None, "autoencoder checkpoint [the one inside; for existing files, the one found]", kind=str
    )
    force: bool = option(False, "take an --ae-ckpt other than the one trained with")
    seeds: str = option("0-9999", "an image each: numbers and ranges, such as 0-999999,5,7")
    labels: str = option(
        "balanced",
        "balanced: each class in turn; random: drawn from the seed; digits in turn, such as 7 or 0-4,9; "
        "or file:PATH with a label for each seed",
    )
    outdir: str = option("generated", "the dataset's folder, or s3://, gs:// and what else pyarrow opens")
    format: str = option("parquet", "what a shard is", choices=("parquet", "png", "webdataset"))
    shard_size: int = option(10_000, "images per shard", low=1, high=200_000)
    save_latents: bool = option(False, "also write the whitened latents")
    npz: bool = option(False, "also write images.npz: arr_0 uint8 (N, H, W, 3), arr_1 labels")
    num_workers: int | None = option(None, "workers [one per GPU, or per CPU core]", kind=int, low=1)
    batch_size: int | None = option(
        None, "images computed at a time; no byte depends on it [CPU: 2048; GPU: 65536]", kind=int, low=1, high=10**6
    )
    device: str | None = option(None, "cuda, mps or cpu [the best there is]", kind=str, choices=("cuda", "mps", "cpu"))
    resume: str = option("auto", "auto: finish what is there; never: refuse a folder in use", choices=("auto", "never"))
    dry_run: bool = option(False, "say what would be made, how large and how long; write nothing")
    requests: str | None = option(None, "a JSONL file of requests to answer instead; see --output", kind=str)
    output: str | None = option(
        None, "the answers to --requests, a JSONL file; errors go beside it [FILE.answers.jsonl]", kind=str
    )


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Config):
    """``python -m ldm_ray.generate verify DIR``"""

    sample: int = option(100, "images made again and compared; 0 = check the hashes alone", low=0, high=10**7)
    seed: int | None = option(None, "which images those are follows from it [drawn]", kind=int, low=0, high=MAX_SEED)
    ckpt: str | None = option(None, "the checkpoint, if it has moved [as recorded]", kind=str)
    ae_ckpt: str | None = option(None, "the autoencoder that was given [as recorded]", kind=str)
    device: str | None = option(None, "cuda, mps or cpu [as recorded]", kind=str, choices=("cuda", "mps", "cpu"))


@dataclass(frozen=True, kw_only=True)
class ClassifiersConfig(Config):
    """``python -m ldm_ray.metrics.train_classifiers``"""

    dataset: str = option("auto", DATASET_HELP)
    cache_dir: str | None = option(None, CACHE_HELP, kind=str)
    output: str = option("classifiers", "folder for lenet.pt and residual.pt")
    epochs: int | None = option(None, "passes over the training images [20 and 12]", kind=int, low=1)
    seed: int = option(42, "everything random follows from it", low=0, high=MAX_SEED)


def outdir(given: str | None) -> Path:
    """The absolute output directory: as given, else $SCRATCH, else ./outputs."""
    return Path(given or os.environ.get("SCRATCH") or "outputs").expanduser().absolute()


def cache_dir(given: str | None) -> Path:
    """The absolute cache directory: as given, else $SLURM_TMPDIR, else ./hf_cache."""
    return Path(given or os.environ.get("SLURM_TMPDIR") or "hf_cache").expanduser().absolute()
