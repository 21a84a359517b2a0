"""The settings of the commands that make a dataset and check one."""

from __future__ import annotations

from dataclasses import dataclass

from ldm_ray.settings.gpu_share import accelerator_option, gpus_option
from ldm_ray.settings.limits import MAX_SEED
from ldm_ray.settings.options import Config, option
from ldm_ray.settings.sampling import SamplingConfig
from ldm_ray.settings.shared import ModelConfig, device_option


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ModelConfig, SamplingConfig):
    """``python -m ldm_ray.generate``"""

    ckpt: str | None = option(None, "denoiser checkpoint [the newest under $SCRATCH, else ./outputs]")
    seeds: str = option("0-9999", "an image each: numbers and ranges, such as 0-999999,5,7")
    labels: str = option(
        "balanced",
        "balanced: each class in turn; random (or random:0-4): drawn from the seed; classes in turn, such as 7, 0-4,9 "
        "or their names; or file:PATH with a label for each seed",
    )
    outdir: str = option("generated", "the dataset's folder, or s3://, gs:// and what else pyarrow opens")
    format: str = option("parquet", "what a shard is", choices=("parquet", "png", "webdataset"))
    shard_size: int = option(10_000, "images per shard", low=1, high=200_000)
    save_latents: bool = option(False, "also write the whitened latents")
    npz: bool = option(False, "also write images.npz: arr_0 uint8 (N, H, W, 3), arr_1 labels")
    num_workers: int | None = option(None, "workers [all that the GPUs take, or one per CPU core]", low=1)
    gpus_per_worker: float | None = gpus_option("a worker")
    accelerator_type: str | None = accelerator_option()
    batch_size: int | None = option(
        None, "images computed at a time; no byte depends on it [CPU: 2048; GPU: 65536]", low=1, high=10**6
    )
    device: str | None = device_option()
    resume: str = option("auto", "auto: finish what is there; never: refuse a folder in use", choices=("auto", "never"))
    dry_run: bool = option(False, "say what would be made, how large and how long; write nothing")
    requests: str | None = option(None, "a JSONL file of requests to answer instead; see --output")
    output: str | None = option(
        None, "the answers to --requests, a JSONL file; errors go beside it [FILE.answers.jsonl]"
    )


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Config):
    """``python -m ldm_ray.generate verify DIR``"""

    sample: int = option(100, "images made again and compared; 0 = check the hashes alone", low=0, high=10**7)
    seed: int | None = option(None, "which images those are follows from it [drawn]", low=0, high=MAX_SEED)
    ckpt: str | None = option(None, "the checkpoint, if it has moved [as recorded]")
    ae_ckpt: str | None = option(None, "the autoencoder that was given [as recorded]")
    device: str | None = device_option("as recorded")
