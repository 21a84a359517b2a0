"""Prints what a checkpoint is: its kind, sizes, schedule, classes, training and hash; all that it says of itself.

python -m ldm_ray.inspect                                the newest checkpoint, in a few lines
python -m ldm_ray.inspect latest.pt --all                every setting and hash
python -m ldm_ray.inspect latest.pt --json
"""

from __future__ import annotations

if not __package__:  # python ldm_ray/inspect.py
    __import__("as_file")

import json
from collections.abc import Sequence
from typing import Any

from ldm_ray.files.paths import AnyPath, outdir
from ldm_ray.terminal import cli, flags
from ldm_ray.terminal.text import shown

PROG = "python -m ldm_ray.inspect"


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.Parser(prog=PROG, description=__doc__)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="?",
        help="a .pt file, of the autoencoder or the denoiser [the newest denoiser under $SCRATCH, else ./outputs]",
    )
    parser.add_argument("--all", action="store_true", help="print every setting, not the main lines alone")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    given = parser.parse_args(argv)
    from ldm_ray.checkpoints.choose import named_or_newest

    facts = describe(named_or_newest(given.checkpoint, outdir(None), by=""))
    if given.json:
        print(json.dumps(facts, indent=1, default=str))
    else:
        show(facts if given.all else main_lines(facts))
    return 0


def main_lines(facts: dict[str, Any]) -> dict[str, Any]:
    """Of what ``describe`` gives, at most 12 lines for a reader."""
    schedule, inside, data = (facts.get(key) or {} for key in ("schedule", "autoencoder", "data"))
    pixels = facts["kind"] == "pixel_diffusion"
    sizes = {
        "latent_dim": "{} pixels" if pixels else "latent of {}",
        "hidden_dim": "{} wide",
        "num_blocks": "{} blocks",
    }
    losses = {"train_loss": "train loss {:.4f}", "val_loss": "validation loss {:.4f}"}
    state = {"state": "{}"} if facts.get("state") else {"epoch": "epoch {}"}
    lines = {
        "file": facts["file"],
        "kind": facts["kind"] + (f", type {facts['type']}" if "type" in facts else ""),
        "sha256": facts["sha256"],
        "run": facts.get("exp_name"),
        "network": ", ".join([f"{facts['parameters']:,} parameters", *phrases(facts, sizes)]),
        "classes": facts.get("class_names"),
        "schedule": schedule and f"{schedule['beta_schedule']}, T {schedule['num_train_timesteps']}",
        "autoencoder": inside and ", ".join(phrases(inside, {"type": "{}", "path": "{}"})),
        "images": ", ".join(
            phrases({**inside, **facts}, {"image_size": "{}", "only_digit": "digit {} alone"})
            + phrases(data, {"dataset": "of {}"})
        ),
        "trained": ", ".join(phrases(facts, {**state, **losses, "train_seconds": "{:,.0f} s"})),
        "quality": ", ".join(f"{name} {value}" for name, value in (facts.get("quality") or {}).items()),
        "more": "--all: every setting",
    }
    return {name: text for name, text in lines.items() if text}


def phrases(values: dict[str, Any], forms: dict[str, str]) -> list[str]:
    """Those of the values that are there, each in its form; as they are where they do not fit it."""
    words = []
    for key, form in forms.items():
        if values.get(key) is not None:
            try:
                words.append(form.format(values[key]))
            except (TypeError, ValueError):  # a file may say anything
                words.append(str(values[key]))
    return words


def describe(path: AnyPath) -> dict[str, Any]:
    """What the file holds. CheckpointError when it is no usable checkpoint."""
    from ldm_ray.checkpoints.checkpoint import AutoencoderCheckpoint, load

    loaded = load(path)
    facts: dict[str, Any] = {"file": loaded.path, "kind": loaded.kind, "sha256": loaded.sha256}
    if isinstance(loaded, AutoencoderCheckpoint):
        facts |= {"type": loaded.codec.kind, "latent_dim": loaded.codec.latent_dim}
        facts |= {"parameters": sum(p.numel() for p in loaded.codec.model.parameters())}
        facts |= {"image_size": loaded.codec.image_size, "only_digit": loaded.only_digit}
        return facts | settings_once(loaded.info)
    denoiser, carried = loaded.denoiser, loaded.autoencoder
    facts |= {
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "latent_dim": denoiser.latent_dim,
        "hidden_dim": denoiser.hidden_dim,
        "num_classes": denoiser.num_classes,
        "class_names": ", ".join(loaded.class_names),
        "schedule": loaded.schedule.to_dict(),
        "averaged_weights": loaded.averaged,
        "resumable": loaded.resumable,
    }
    if loaded.kind == "pixel_diffusion":
        assert loaded.codec is not None
        return facts | {"image_size": loaded.codec.image_size} | settings_once(loaded.info)
    facts["num_blocks"] = denoiser.num_blocks
    if carried:
        size = {"image_size": carried.codec.image_size}
        facts["autoencoder"] = {"type": carried.codec.kind} | size | {"path": carried.path, "sha256": carried.sha256}
    else:
        args = loaded.args
        facts["autoencoder"] = {"type": args.get("ae_model"), "path": args.get("ae_ckpt"), "carried": False}
    return facts | settings_once(loaded.info)


def settings_once(info: dict[str, Any]) -> dict[str, Any]:
    """Without the settings in ``args`` that ``config`` has as well."""
    config, args = info.get("config", {}), info.get("args", {})
    rest = {key: value for key, value in args.items() if key not in config or config[key] != value}
    return {key: value for key, value in info.items() if key != "args"} | ({"args": rest} if rest else {})


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
