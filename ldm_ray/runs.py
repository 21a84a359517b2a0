"""The only place that knows paths and file names of a run."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ldm_ray.checkpoint import AutoencoderCheckpoint, autoencoder_type, load_autoencoder
from ldm_ray.config import SPACES, AutoencoderConfig, RunConfig
from ldm_ray.errors import CheckpointError, ConfigError, Foreign
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
    """Makes the directory, or says in one line why it cannot be used."""
    try:
        outdir.mkdir(parents=True, exist_ok=True)
        probe = outdir / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--outdir {outdir} cannot be written: {error.strerror or error}") from None


def newest_first(files: Iterable[AnyPath]) -> list[AnyPath]:
    """Those that can be looked at: no dangling link, no loop of links."""
    dated = []
    for file in files:
        try:
            dated.append((file.stat().st_mtime, str(file), file))
        except OSError as error:
            log.debug("passed over: %s: %s", file, error)
    return [file for _, _, file in sorted(dated, key=lambda each: each[:2], reverse=True)]


def diffusion_checkpoints(base: AnyPath, spaces: Sequence[str] = SPACES) -> list[AnyPath]:
    """The ``latest.pt`` of every denoiser run under an output directory, the newest first."""
    return newest_first(
        file for space in spaces for file in (base / "checkpoints").glob(f"{space}-diffusion-*/latest.pt")
    )


def newest_diffusion(base: AnyPath, spaces: Sequence[str] = SPACES) -> AnyPath | None:
    """The first of them."""
    return next(iter(diffusion_checkpoints(base, spaces)), None)


def find_autoencoder(
    folder: AnyPath, only_digit: int | None = None, kinds: Sequence[str] | None = None, recorded: str | None = None
) -> AutoencoderCheckpoint | None:
    """The newest autoencoder checkpoint under a folder, by registered type in order: Conv first, then MLP.

    kinds: only these types. recorded: where one was once, in a file that is not trusted; of several of a type, those
    whose last names are the same come first, and the path itself is never followed. One trained on a single digit is
    taken only for that digit. Of each file only what is beside its tensors is read, but of the one that is taken.
    """
    files = newest_first(file for file in folder.rglob("*.pt") if not file.name.startswith("."))
    settled = {file.parent for file in files if file.name == "latest.pt"}
    files = [file for file in files if file.name == "latest.pt" or file.parent not in settled]
    if recorded:
        wanted_names = re.split(r"[/\\]", recorded[-1000:])[::-1]
        files.sort(key=lambda file: names_alike(re.split(r"[/\\]", str(file))[::-1], wanted_names), reverse=True)
    wanted = list(kinds or REGISTRY)
    by_type: dict[str, list[AnyPath]] = {kind: [] for kind in wanted}
    for file in files:
        try:
            kind, digit = autoencoder_type(file)
        except CheckpointError as error:
            log.log(logging.DEBUG if isinstance(error, Foreign) else logging.WARNING, "passed over: %s", error)
            continue
        if kind not in by_type:
            continue
        if digit not in (None, only_digit):
            log.info("passed over: %s was trained on digit %s alone", file, digit)
            continue
        by_type[kind].append(file)
        if kind == wanted[0]:
            try:
                return load_autoencoder(file)
            except CheckpointError as error:
                log.warning("passed over: %s", error)
    for file in (file for kind in wanted[1:] for file in by_type[kind]):
        try:
            return load_autoencoder(file)
        except CheckpointError as error:
            log.warning("passed over: %s", error)
    return None


def names_alike(one: Sequence[str], other: Sequence[str]) -> int:
    """How many names two paths share, from the last."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
