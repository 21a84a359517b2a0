"""The only place that knows paths and file names of a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm_ray.checkpoint import AutoencoderCheckpoint, load_autoencoder, read
from ldm_ray.config import SPACES, AutoencoderConfig, RunConfig
from ldm_ray.errors import CheckpointError, ConfigError
from ldm_ray.models.registry import REGISTRY
from ldm_ray.paths import AnyPath

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPaths:
    """Where the files of one run are, under one absolute output directory."""

    outdir: AnyPath
    name: str

    @property
    def checkpoints(self) -> AnyPath:
        return self.outdir / "checkpoints" / self.name

    @property
    def latest(self) -> AnyPath:
        return self.checkpoints / "latest.pt"

    @property
    def best(self) -> AnyPath:
        """The checkpoint that ``--evaluate-every`` found best."""
        return self.checkpoints / "best.pt"

    def checkpoint(self, epoch: int) -> AnyPath:
        return self.checkpoints / f"checkpoint_epoch_{epoch:06d}.pt"

    def sample(self, epoch: int) -> AnyPath:
        return self.outdir / "samples" / self.name / f"epoch_{epoch:06d}.png"

    @property
    def runs(self) -> AnyPath:
        return self.outdir / "runs" / self.name

    @property
    def metrics(self) -> AnyPath:
        return self.runs / "metrics.jsonl"

    @property
    def quality(self) -> AnyPath:
        """A line for each evaluation beside training."""
        return self.runs / "quality.jsonl"

    @property
    def config(self) -> AnyPath:
        return self.runs / "config.json"

    @property
    def progress(self) -> AnyPath:
        return self.runs / "progress.json"

    @property
    def stop(self) -> AnyPath:
        return self.runs / "stop"

    @property
    def diverged(self) -> AnyPath:
        return self.runs / "diverged"

    @property
    def log(self) -> AnyPath:
        return self.outdir / "logs" / f"{self.name}.log"


def examples_dir(outdir: AnyPath, fingerprint: str) -> AnyPath:
    """Latents (or pixels) that training reads."""
    return outdir / "latents" / fingerprint


def floors_file(outdir: AnyPath, fingerprint: str) -> AnyPath:
    """Measured floors of an autoencoder, which every evaluation over it reuses."""
    return outdir / "floors" / f"{fingerprint}.json"


def run_stem(config: RunConfig) -> str:
    """The run's name without its time; what a resume looks for."""
    digit = "all" if config.only_digit is None else config.only_digit
    start = f"d{digit}-bs{config.batch_size}-lr{config.lr:g}"
    if isinstance(config, AutoencoderConfig):
        return f"ae-{config.model}-{start}-D{config.latent_dim}-seed{config.seed}"
    return f"{config.space}-diffusion-{start}-T{config.num_train_timesteps}-seed{config.seed}"  # type: ignore[attr-defined]


def new_run(config: RunConfig, outdir: AnyPath) -> RunPaths:
    """A run that has no files yet."""
    stem, moment = run_stem(config), time.time()
    while True:
        name = f"{stem}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(moment))}"
        if not (outdir / "checkpoints" / name).exists():
            return RunPaths(outdir, name)
        moment += 1


def newest_run(config: RunConfig, outdir: AnyPath) -> RunPaths | None:
    """The newest run of this stem that has a checkpoint."""
    files = (outdir / "checkpoints").glob(f"{run_stem(config)}-????????-??????/latest.pt")
    found: list[AnyPath] = sorted(files, key=str)
    return RunPaths(outdir, found[-1].parent.name) if found else None


def check_writable(outdir: AnyPath) -> None:
    """Says in one line why the directory, there or not, cannot be written; leaves nothing."""
    folder = outdir
    try:
        while isinstance(folder, Path) and not folder.exists() and not folder.is_symlink():
            folder = folder.parent
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--outdir {outdir} cannot be written: {error.strerror or error}") from None


def diffusion_checkpoints(base: AnyPath, spaces: Sequence[str] = SPACES) -> list[AnyPath]:
    """The ``latest.pt`` of every denoiser run under an output directory, the newest first."""
    found = [file for space in spaces for file in (base / "checkpoints").glob(f"{space}-diffusion-*/latest.pt")]
    return sorted(found, key=lambda file: file.stat().st_mtime, reverse=True)


def newest_diffusion(base: AnyPath, spaces: Sequence[str] = SPACES) -> AnyPath | None:
    """The first of them."""
    return next(iter(diffusion_checkpoints(base, spaces)), None)


def find_autoencoder(
    folder: AnyPath, only_digit: int | None = None, kinds: Sequence[str] | None = None
) -> AutoencoderCheckpoint | None:
    """The newest autoencoder checkpoint under a folder, by registered type in order: Conv first, then MLP.

    kinds: only these types. One trained on a single digit is taken only for that digit. Unreadable files
    are passed over with a note.
    """
    files = [file for file in folder.rglob("*.pt") if not file.name.startswith(".")]
    settled = {file.parent for file in files if file.name == "latest.pt"}
    files = [file for file in files if file.name == "latest.pt" or file.parent not in settled]
    files.sort(key=lambda file: (file.stat().st_mtime, str(file)), reverse=True)
    wanted = list(kinds or REGISTRY)
    best: dict[str, AutoencoderCheckpoint] = {}
    for file in files:
        try:
            if read(file)[1] != "autoencoder":
                continue
            found = load_autoencoder(file)
        except CheckpointError as error:
            log.warning("passed over: %s", error)
            continue
        if found.only_digit not in (None, only_digit):
            log.info("passed over: %s was trained on digit %s alone", file, found.only_digit)
            continue
        best.setdefault(found.codec.kind, found)
        if wanted[0] in best:
            break
    return next((best[kind] for kind in wanted if kind in best), None)
