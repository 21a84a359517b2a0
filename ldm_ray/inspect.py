"""Prints what a checkpoint is: its kind, autoencoder type, sizes, schedule, settings and hashes.

python -m ldm_ray.inspect latest.pt
python -m ldm_ray.inspect latest.pt --json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ldm_ray import cli
from ldm_ray.paths import AnyPath, to_path
from ldm_ray.text import shown

PROG = "python -m ldm_ray.inspect"


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog=PROG, description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .pt file, of the autoencoder or the denoiser")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(argv)
    found = describe(to_path(given.checkpoint))
    if given.json:
        print(json.dumps(found, indent=1, default=str))
    else:
        show(found)
    return 0


def describe(path: AnyPath) -> dict[str, Any]:
    """What the file holds. CheckpointError when it is no usable checkpoint."""
    from ldm_ray import checkpoint

    content, kind = checkpoint.glance(path)
    found: dict[str, Any] = {"file": str(path), "kind": kind}
    if kind == "autoencoder":
        loaded = checkpoint.load_autoencoder(path)
        found |= {"sha256": loaded.sha256, "type": loaded.codec.kind, "latent_dim": loaded.codec.latent_dim}
        found |= {"parameters": sum(p.numel() for p in loaded.codec.model.parameters())}
        found |= {"image_size": loaded.codec.image_size, "only_digit": loaded.only_digit}
        return found | loaded.info
    diffusion = checkpoint.load_diffusion(path)
    denoiser, carried = diffusion.denoiser, diffusion.autoencoder
    found |= {
        "sha256": diffusion.sha256,
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "latent_dim": denoiser.latent_dim,
        "hidden_dim": denoiser.hidden_dim,
        "num_classes": denoiser.num_classes,
        "class_names": ", ".join(diffusion.class_names),
        "schedule": diffusion.schedule.to_dict(),
        "averaged_weights": "ema" in content,
        "resumable": "training" in content,
    }
    if kind == "pixel_diffusion":
        assert diffusion.codec is not None
        return found | {"image_size": diffusion.codec.image_size} | diffusion.info
    found["num_blocks"] = denoiser.num_blocks
    if carried:
        size = {"image_size": carried.codec.image_size}
        found["autoencoder"] = {"type": carried.codec.kind} | size | {"path": carried.path, "sha256": carried.sha256}
    else:
        args = content["args"]
        found["autoencoder"] = {"type": args.get("ae_model"), "path": args.get("ae_ckpt"), "carried": False}
    return found | diffusion.info


def show(values: dict[str, Any], indent: str = "") -> None:
    """Prints nested values, a line each."""
    for key, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{shown(key)}")
            show(value, indent + "  ")
        else:
            print(f"{indent}{shown(key):<{max(1, 26 - len(indent))}} {shown(str(value), 300)}")


if __name__ == "__main__":
    cli.run(main, PROG)
