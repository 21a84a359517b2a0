"""The only place that knows paths and file names of a run."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from ldm_ray.checkpoints.checkpoint import AutoencoderCheckpoint, autoencoder_type, load_autoencoder
from ldm_ray.files.hold import new_folder, time_in
from ldm_ray.files.paths import AnyPath, unique
from ldm_ray.models.registry import REGISTRY
from ldm_ray.settings.diffusion import SPACES
from ldm_ray.settings.errors import CheckpointError, ConfigError, Foreign
from ldm_ray.settings.training import AutoencoderConfig, RunConfig

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


def new_run(config: RunConfig, outdir: AnyPath, held: ExitStack) -> RunPaths:
    """A run that nobody else has: it creates the folder that its name is, and holds it until the stack closes."""
    return RunPaths(outdir, new_folder(outdir / "checkpoints", run_stem(config), held).name)


def newest_run(config: RunConfig, outdir: AnyPath) -> RunPaths | None:
    """The newest run of this stem that has a checkpoint."""
    files = newest_first((outdir / "checkpoints").glob(f"{run_stem(config)}-????????-??????/latest.pt"))
    return RunPaths(outdir, files[0].parent.name) if files else None


def newest_first(files: Iterable[AnyPath]) -> list[AnyPath]:
    """Files of runs, those of the run that was begun last first: every command's "newest".

    A run was begun at the time that its folder is named after; for other folders the file's own time counts. What
    cannot be looked at, such as a link to nowhere, is left out.
    """
    aged = []
    for file in files:
        with suppress(OSError):
            changed, begun = file.stat().st_mtime, time_in(file.parent.name)
            aged.append((changed if begun is None else begun, changed, str(file), file))
    return [file for *_, file in sorted(aged, key=lambda each: each[:3], reverse=True)]


def check_writable(outdir: AnyPath) -> None:
    """Says in one line why the directory, there or not, cannot be written; leaves nothing."""
    folder = outdir
    try:
        while isinstance(folder, Path) and not folder.exists() and not folder.is_symlink():
            folder = folder.parent
        probe = folder / f".write-test-{unique()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--outdir {outdir} cannot be written: {error.strerror or error}") from None


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
    """The newest finished autoencoder checkpoint under a folder, by registered type in order: Conv first, then MLP.

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
    by_type: dict[str, list[AnyPath]] = {kind: [] for kind in kinds or REGISTRY}
    first = next(iter(by_type))
    for file in files:
        kind = type_of(file, only_digit)
        if kind == first and (autoencoder := finished_autoencoder(file)):
            return autoencoder
        by_type.get(kind, []).append(file)
    others = (file for kind, others in by_type.items() if kind != first for file in others)
    return next(filter(None, map(finished_autoencoder, others)), None)


def type_of(file: AnyPath, only_digit: int | None) -> str:
    """The type of an autoencoder that is of use; empty for anything else, which is passed over with a note."""
    try:
        kind, digit = autoencoder_type(file)
    except CheckpointError as error:
        log.log(logging.DEBUG if isinstance(error, Foreign) else logging.WARNING, "passed over: %s", error)
        return ""
    if kind and digit not in (None, only_digit):
        log.info("passed over: %s was trained on digit %s alone", file, digit)
        return ""
    return kind


def finished_autoencoder(file: AnyPath) -> AutoencoderCheckpoint | None:
    """None, with a note, where it does not load or its training did not end."""
    try:
        autoencoder = load_autoencoder(file)
    except CheckpointError as error:
        log.warning("passed over: %s", error)
        return None
    if autoencoder.unfinished:
        log.warning(
            "not taken: %s is %s; --auto-resume with the settings it was begun with finishes it, --ae-ckpt takes it "
            "as it is", file, autoencoder.unfinished
        )  # fmt: skip
        return None
    return autoencoder


def names_alike(one: Sequence[str], other: Sequence[str]) -> int:
    """How many names two paths share, from the last."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def name_of(path: AnyPath) -> str:
    """The run's name for its ``latest.pt``, run and file for its other checkpoints, else the file's name."""
    if path.name == "latest.pt":
        return path.parent.name
    return f"{path.parent.name}-{path.stem}" if path.stem.startswith("checkpoint_epoch_") else path.stem
