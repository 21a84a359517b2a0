"""From a configuration to a trained run: images → autoencoder → latents → denoiser. Each step once."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from ldm_ray.checkpoints import checkpoint, runs
from ldm_ray.checkpoints.checkpoint import AutoencoderCheckpoint
from ldm_ray.checkpoints.runs import RunPaths
from ldm_ray.data.classes import numbered
from ldm_ray.data.examples import read_examples
from ldm_ray.data.identity import changes, record_of
from ldm_ray.data.sources import ImageSource, load_source
from ldm_ray.distributed import fit
from ldm_ray.distributed.cluster import connected
from ldm_ray.distributed.encode import encode
from ldm_ray.distributed.gpus import share_of
from ldm_ray.files.hold import hold
from ldm_ray.files.paths import AnyPath, Mirror, cache_dir, outdir, to_path, write_bytes
from ldm_ray.models.registry import check_size
from ldm_ray.models.unet import check_unet
from ldm_ray.settings.errors import CheckpointError, ConfigError
from ldm_ray.settings.training import AutoencoderConfig, RunConfig, TrainConfig
from ldm_ray.training.fit import Job

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """paths of the run; code: 0, or 128 + the signal that stopped it."""

    paths: RunPaths
    code: int


def train_autoencoder(config: AutoencoderConfig) -> Outcome:
    """``python -m ldm_ray.train_autoencoder``: images → pixels (Ray Data) → autoencoder (Ray Train)."""
    base = outdir(config.outdir)
    runs.check_writable(base)
    with ExitStack() as held:
        before = resumed(config, base, held)
        with connected():
            share_of(config)
            source = load_source(config.dataset, "train", cache_dir(config.cache_dir), config.only_digit)
            return _fit_autoencoder(config, source, base, held, before)


def train(config: TrainConfig) -> Outcome:
    """``python -m ldm_ray.train``: images → latents (Ray Data) → denoiser (Ray Train).

    Without an autoencoder anywhere, trains one first: Conv with a GPU, MLP without. ``--space pixel`` needs none:
    images → pixels (Ray Data) → U-Net (Ray Train).
    """
    base = outdir(config.outdir)
    runs.check_writable(base)
    with ExitStack() as held:
        return _train(config, base, held)


def _train(config: TrainConfig, base: AnyPath, held: ExitStack) -> Outcome:
    paths, content = resumed(config, base, held)
    pixels, autoencoder = config.space == "pixel", None
    if not pixels:
        autoencoder = autoencoder_of(config, base, paths, content)
    with connected():
        if pixels:
            source, folder = pixels_of(config, base)
        else:
            latents = latents_of(config, base, autoencoder)
            if isinstance(latents, Outcome):
                return latents
            source, folder = latents.source, latents.folder
            # A resumed run keeps the statistics it began with
            autoencoder = latents.whitened if content is None and config.whiten else latents.autoencoder
        cache = cache_dir(config.cache_dir)
        test = load_source(source.name, "test", cache, config.only_digit) if config.evaluate_every else None
        return _fit(config, source, folder, base, held, paths, content, autoencoder, test)


def pixels_of(config: TrainConfig, base: AnyPath) -> tuple[ImageSource, AnyPath]:
    """(the images, the folder with them as pixels), within ``connected()``."""
    share_of(config)
    source = load_source(config.dataset, "train", cache_dir(config.cache_dir), config.only_digit)
    check_unet(source.image_size, config.hidden_dim)
    return source, encode(source, None, base, config.encode_workers)


@dataclass(frozen=True)
class Latents:
    """folder: the encoded images of source. autoencoder: the one that made them."""

    source: ImageSource
    folder: AnyPath
    autoencoder: AutoencoderCheckpoint

    @property
    def whitened(self) -> AutoencoderCheckpoint:
        """The autoencoder with the statistics of these latents."""
        codec = self.autoencoder.codec.with_statistics(read_examples(self.folder).statistics)
        return dataclasses.replace(self.autoencoder, codec=codec)


def latents_of(config: TrainConfig, base: AnyPath, autoencoder: AutoencoderCheckpoint | None) -> Latents | Outcome:
    """The images as latents of the autoencoder found, within ``connected()``.

    Without one, trains it first; when a signal stops that, its outcome.
    """
    share = share_of(config)
    source = load_source(config.dataset, "train", cache_dir(config.cache_dir), config.only_digit)
    if autoencoder is None:
        kind = "conv" if share and not any(side % 2 for side in source.image_size) else "mlp"
        log.info("no finished autoencoder found: training one first (%s)", kind)
        shared = (
            *("recipe", "dataset", "cache_dir", "only_digit", "seed", "device", "num_workers", "encode_workers"),
            *("gpus_per_worker", "accelerator_type", "generate_images", "max_failures"),
        )
        settings = {name: getattr(config, name) for name in shared}
        first = AutoencoderConfig(**settings, model=kind, outdir=str(base), auto_resume=config.auto_resume)
        with ExitStack() as held:
            before = resumed(first, base, held)
            outcome = _fit_autoencoder(first, source, base, held, before, goes_on=True)
        if outcome.code:
            return outcome
        autoencoder = checkpoint.load_autoencoder(outcome.paths.latest)
    log.info(
        "autoencoder: %s (type %s, %d numbers)", autoencoder.path, autoencoder.codec.kind, autoencoder.codec.latent_dim
    )
    if source.image_size != autoencoder.codec.image_size:
        raise ConfigError(
            f"images are {source.image_size}, the autoencoder {autoencoder.path} takes {autoencoder.codec.image_size}: "
            "name another by --ae-ckpt, or make one with python -m ldm_ray.train_autoencoder"
        )
    trained_on = autoencoder.info.get("data", {}).get("revision")
    if trained_on not in (None, source.revision):
        log.warning(
            "WARNING: the autoencoder was trained on other images than %s; --ae-ckpt names another", source.name
        )
    folder = encode(source, autoencoder, base, config.encode_workers, share)
    return Latents(source, folder, autoencoder)


def _fit_autoencoder(
    config: AutoencoderConfig,
    source: ImageSource,
    base: AnyPath,
    held: ExitStack,
    before: tuple[RunPaths | None, dict[str, Any] | None],
    goes_on: bool = False,
) -> Outcome:
    """before: of ``resumed``."""
    check_size(config.model, source.image_size)
    folder = encode(source, None, base, config.encode_workers)
    return _fit(config, source, folder, base, held, *before, None, goes_on=goes_on)


def _fit(
    config: RunConfig,
    source: ImageSource,
    folder: AnyPath,
    base: AnyPath,
    held: ExitStack,
    paths: RunPaths | None,
    content: dict[str, Any] | None,
    autoencoder: AutoencoderCheckpoint | None,
    test: ImageSource | None = None,
    goes_on: bool = False,
) -> Outcome:
    """Trains a new run, which is held by the stack, or goes on with the one of ``content``.

    goes_on: more work follows, which a stop request in the last epoch is meant for as well.
    """
    data = record_of(source, autoencoder.sha256 if autoencoder else None)
    if content is not None:
        assert paths is not None
        if "class_names" not in content["data"]:  # a run of an earlier version, whose denoiser has ten classes
            data["class_names"] = list(numbered(10))
        if changed := changes(content["data"], data):
            raise ConfigError(
                f"--auto-resume: {paths.name} was trained on other data ({'; '.join(changed)}); name those images by "
                "--dataset, or leave --auto-resume out for a new run"
            )
        state = content["training"]
        if state["finished"] or state["epoch"] >= config.epochs:
            reason = "stopped early" if state["finished"] else f"--epochs is {config.epochs}"
            log.info("%s has %d epochs and %s; nothing left to do", paths.name, state["epoch"], reason)
            return Outcome(paths, 0)
        log.info("going on with %s after epoch %d, step %d", paths.name, state["epoch"], state["step"])
    paths = paths or runs.new_run(config, base, held)
    record = {"config": config.to_dict(), "data": data, "examples": folder.name, "versions": checkpoint.versions()}
    write_bytes(paths.config, json.dumps(record, indent=1).encode())
    embedded = checkpoint.embed(autoencoder) if autoencoder else None
    with log_file(paths.log):
        log.info("run %s: %s images of %s", paths.name, f"{len(source):,}", source.name)
        code = fit.run(Job(config, paths, folder, data, embedded), test, goes_on)
    return Outcome(paths, code)


def resumed(config: RunConfig, base: AnyPath, held: ExitStack) -> tuple[RunPaths | None, dict[str, Any] | None]:
    """(paths, checkpoint) of the newest run of these settings under ``--auto-resume``, else (None, None).

    The run is held until the stack closes. Raises ConfigError when another command has it, or when its configuration
    differs, with what differs.
    """
    paths = runs.newest_run(config, base) if config.auto_resume else None
    if paths is None:
        if config.auto_resume:
            log.info("--auto-resume: no run %s-… in %s; starting a new one", runs.run_stem(config), base)
        return None, None
    held.enter_context(hold(paths.checkpoints))
    content, _ = checkpoint.read(paths.latest)
    if not isinstance(content.get("training"), dict):
        raise CheckpointError(f"--auto-resume: {paths.latest} holds no training state")
    if differing := config.differences(content["config"]):
        raise ConfigError(
            f"--auto-resume: {paths.name} has another configuration ({'; '.join(differing)}); "
            "give the same settings, or leave --auto-resume out for a new run"
        )
    return paths, content


def autoencoder_of(
    config: TrainConfig, base: AnyPath, paths: RunPaths | None = None, content: dict[str, Any] | None = None
) -> AutoencoderCheckpoint | None:
    """The autoencoder to use: the resumed run's own, the one given, or the newest found."""
    given = checkpoint.load_autoencoder(to_path(config.ae_ckpt).absolute()) if config.ae_ckpt else None
    if paths is not None and content is not None:
        own = checkpoint.from_embedded(content.get("autoencoder"), paths.latest)
        if own is None:
            raise CheckpointError(f"--auto-resume: {paths.latest} carries no autoencoder")
        if given and given.sha256 != own.sha256:
            raise ConfigError(f"--auto-resume: the run has autoencoder {own.sha256}, --ae-ckpt is {given.sha256}")
        return own
    if given is None:
        folder = to_path(config.ae_ckpt_dir).absolute() if config.ae_ckpt_dir else base
        if config.ae_ckpt_dir and not folder.is_dir():
            raise ConfigError(f"--ae-ckpt-dir {folder} is no folder")
        given = runs.find_autoencoder(folder, config.only_digit)
        if given is None and config.ae_ckpt_dir:
            raise ConfigError(
                f"--ae-ckpt-dir {folder} holds no autoencoder checkpoint that suits; name one by --ae-ckpt"
            )
    if given and given.unfinished:
        log.warning("WARNING: the autoencoder %s is %s", given.path, given.unfinished)
    if given and given.only_digit not in (None, config.only_digit):
        log.warning("WARNING: the autoencoder was trained on digit %s alone", given.only_digit)
    return given


@contextmanager
def log_file(path: AnyPath) -> Iterator[None]:
    """Everything logged goes to the run's file as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mirror = Mirror(path.parent)
    handler = logging.FileHandler(mirror.fetch(path.name), encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk ends the run elsewhere
    logger = logging.getLogger("ldm_ray")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        mirror.close()
