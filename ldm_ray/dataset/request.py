"""What a dataset is to hold, and the manifest that fixes it in its folder."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from ldm_ray.checkpoints import checkpoint
from ldm_ray.dataset.rows import Labels, Seeds
from ldm_ray.files.records import fingerprint
from ldm_ray.files.store import Store
from ldm_ray.settings.errors import ConfigError, DataError
from ldm_ray.settings.sampling import SamplingConfig

MANIFEST = "manifest.json"
VERSION = 2  # of the manifest and the shards


@dataclass(frozen=True, kw_only=True)
class Request:
    """All that the bytes of a dataset follow from. ``sampling`` has its defaults filled in; ``engine`` is the
    generator's fingerprint: its version, PyTorch's and the kind of device."""

    seeds: Seeds
    labels: Labels
    sampling: SamplingConfig
    shard_size: int
    format: str
    latent_dim: int
    save_latents: bool
    checkpoint_sha256: str
    autoencoder_sha256: str
    engine: str

    @property
    def count(self) -> int:
        return len(self.seeds)

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.shard_size)

    def stem(self, shard: int) -> str:
        """A shard's name without the ending."""
        return f"train-{shard:05d}-of-{self.num_shards:05d}"

    def span(self, shard: int) -> tuple[int, int]:
        """Positions (first, behind the last) of a shard."""
        return shard * self.shard_size, min(self.count, (shard + 1) * self.shard_size)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What is compared when a folder is used again."""
        return {
            "version": VERSION,
            "seeds": str(self.seeds),
            "labels": self.labels.rule,
            **self.sampling.to_dict(),
            "format": self.format,
            "shard_size": self.shard_size,
            "save_latents": self.save_latents,
            "checkpoint_sha256": self.checkpoint_sha256,
            "autoencoder_sha256": self.autoencoder_sha256,
            "engine": self.engine,
            "pyarrow": pa.__version__ if self.format == "parquet" else None,
        }

    @cached_property
    def fingerprint(self) -> str:
        """24 hexadecimal digits of the identity."""
        return fingerprint(self.identity)

    def manifest(self, ckpt: str, ae_ckpt: str | None, device: str) -> dict[str, Any]:
        """The manifest's content; where the checkpoints were and the device are there to find them again."""
        return {
            "fingerprint": self.fingerprint,
            "request": self.identity,
            "num_images": self.count,
            "num_shards": self.num_shards,
            "num_classes": self.labels.num_classes,
            "latent_dim": self.latent_dim,
            "ckpt": ckpt,
            "ae_ckpt": ae_ckpt,
            "device": device,
            "versions": checkpoint.versions() | {"pyarrow": pa.__version__},
        }

    def differences(self, manifest: dict[str, Any]) -> list[str]:
        """What the folder's request has that this one has not."""
        there = manifest["request"]
        keys = [key for key in {**there, **self.identity} if there.get(key) != self.identity.get(key)]
        return [f"{key} {shown(there.get(key))} there, {shown(self.identity.get(key))} asked for" for key in keys]


def shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:48]}… ({len(text)} characters)"


def read_manifest(store: Store) -> dict[str, Any] | None:
    """The folder's manifest, or None where there is none. DataError when it is damaged."""
    try:
        found = json.loads(store.read(MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{store}/{MANIFEST} cannot be read: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("request"), dict):
        raise DataError(f"{store}/{MANIFEST} is not the manifest of a generated dataset")
    return found


def check(store: Store, request: Request, resume: str) -> dict[str, Any] | None:
    """The manifest of a folder that holds this request, or None for an empty folder; writes nothing.

    ConfigError when the folder holds another request or other files, or anything with ``resume`` never.
    """
    found = read_manifest(store)
    if found is None:
        strange = [name for name in store.sizes() if not name.startswith(".")]
        if strange:
            raise ConfigError(f"--outdir {store} holds other files ({min(strange)}): name a new or empty folder")
        return None
    if resume == "never":
        raise ConfigError(f"--outdir {store} holds a dataset already: name another, or leave --resume never out")
    differences = request.differences(found)
    if differences:
        raise ConfigError(f"--outdir {store} holds another request: {'; '.join(differences)}; name another folder")
    return found


def write_manifest(store: Store, manifest: dict[str, Any]) -> None:
    """Fixes a new folder's request."""
    store.write(MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")


def rebuild(manifest: dict[str, Any], store: Store) -> Request:
    """The request of a manifest. Labels from a file are not there: those in the shards count. DataError."""
    try:
        identity = dict(manifest["request"])
        if identity["version"] != VERSION:
            raise DataError(f"{store} was made by another version of ldm_ray: its format is {identity['version']}")
        num_classes, seeds = int(manifest["num_classes"]), Seeds.parse(identity["seeds"])
        rule = str(identity["labels"])
        labels = Labels(rule, num_classes) if rule.startswith("file:") else Labels.parse(rule, num_classes, 0)
        fields = [field.name for field in dataclasses.fields(SamplingConfig)]
        others = ("shard_size", "format", "save_latents", "checkpoint_sha256", "autoencoder_sha256", "engine")
        return Request(
            seeds=seeds,
            labels=labels,
            sampling=SamplingConfig(**{key: identity[key] for key in fields}),
            latent_dim=int(manifest["latent_dim"]),
            **{key: identity[key] for key in others},
        )
    except (KeyError, TypeError, ConfigError) as error:
        raise DataError(f"{store}/{MANIFEST} is damaged: {error}") from None
