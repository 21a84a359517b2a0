"""Which checkpoint a command works with, and the autoencoder of one that carries none."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ldm_ray.checkpoints import runs
from ldm_ray.checkpoints.checkpoint import AutoencoderCheckpoint, DiffusionCheckpoint, load_diffusion
from ldm_ray.files.paths import AnyPath, to_path
from ldm_ray.models.registry import REGISTRY
from ldm_ray.settings.diffusion import SPACES
from ldm_ray.settings.errors import CheckpointError, ConfigError
from ldm_ray.settings.shared import ModelConfig
from ldm_ray.terminal.text import shown

log = logging.getLogger(__name__)


def chosen(config: ModelConfig, base: AnyPath) -> DiffusionCheckpoint:
    """The checkpoint that the flags name, or the newest under an output directory, with an autoencoder. LdmError."""
    path = named_or_newest(config.ckpt, base)
    return load(path, to_path(config.ae_ckpt) if config.ae_ckpt else None, config.force, [path.parent, base])


def named_or_newest(ckpt: str | None, base: AnyPath, by: str = " by --ckpt", space: str = "") -> AnyPath:
    """Of a denoiser, in any space or in one. by: how the user names one. ConfigError when there is none."""
    path = to_path(ckpt) if ckpt else runs.newest_diffusion(base, (space,) if space else SPACES)
    if path is None:
        flag = f" --space {space}" if space else ""
        raise ConfigError(
            f"no checkpoint{flag and ' of' + flag} under {base}: name one{by}, or make one with "
            f"python -m ldm_ray.train{flag}"
        )
    return path


def load(
    path: AnyPath, ae_ckpt: AnyPath | None = None, force: bool = False, search: Sequence[AnyPath] = ()
) -> DiffusionCheckpoint:
    """Reads a denoiser checkpoint with an autoencoder: one that is named, its own, or one under ``search``.

    Raises CheckpointError, also when there is none.
    """
    return completed(load_diffusion(path, ae_ckpt, force), search)


def completed(loaded: DiffusionCheckpoint, search: Sequence[AnyPath]) -> DiffusionCheckpoint:
    """With an autoencoder of the recorded type from the folders of ``search`` where it has none. CheckpointError."""
    if loaded.codec is not None:
        return loaded
    autoencoder = recorded_autoencoder(loaded, search)
    if autoencoder is None:
        kind, place = (shown(loaded.args.get(key) or "") for key in ("ae_model", "ae_ckpt"))
        raise CheckpointError(
            f"checkpoint {loaded.path} carries no autoencoder: name the {kind or 'autoencoder'} checkpoint it was "
            f"trained with by --ae-ckpt (it was {place or 'not recorded'})"
        )
    log.info("autoencoder: %s, found by its recorded type; --ae-ckpt names another", autoencoder.path)
    return loaded.joined(autoencoder)


def recorded_autoencoder(loaded: DiffusionCheckpoint, search: Sequence[AnyPath]) -> AutoencoderCheckpoint | None:
    """The autoencoder that a checkpoint without one names, by its type; of several the one whose file has the names
    that were recorded, else the newest. The recorded path is a stranger's and never followed."""
    args, kind = loaded.args, str(loaded.args.get("ae_model") or "").removeprefix("ae-")
    for folder in search:
        if kind in REGISTRY and is_folder(folder):
            autoencoder = runs.find_autoencoder(folder, args.get("ae_only_digit"), [kind], args.get("ae_ckpt"))
            if autoencoder is not None:
                return autoencoder
    return None


def is_folder(path: AnyPath) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False
