"""Measures a checkpoint's images against real ones, always beside the floors of its autoencoder.

python -m ldm_ray.evaluate                               the newest checkpoint, 10,000 images for each of 3 seeds
python -m ldm_ray.evaluate --ckpt latest.pt --guidance-scale 1,1.5,2
python -m ldm_ray.evaluate --ckpt latest.pt --samples 1000 --seeds 0 --no-baselines

What each figure is: docs/quality.md.
"""

from __future__ import annotations

if not __package__:  # python ldm_ray/evaluate.py
    __import__("as_file")

from collections.abc import Sequence

from ldm_ray.files.paths import cache_dir, outdir
from ldm_ray.settings.evaluation import EvaluateConfig
from ldm_ray.terminal import cli, flags

PROG = "python -m ldm_ray.evaluate"


def main(argv: Sequence[str] | None = None) -> int:
    config = flags.parse_config(EvaluateConfig, flags.Parser(prog=PROG, description=__doc__), argv)
    output = cli.folder_path(config.output)
    from ldm_ray.checkpoints import runs
    from ldm_ray.checkpoints.checkpoint import versions
    from ldm_ray.checkpoints.choose import chosen
    from ldm_ray.data.images import encode_png
    from ldm_ray.data.recorded import load_own
    from ldm_ray.devices.device import pick_device
    from ldm_ray.engine.generator import Generator, check_precision
    from ldm_ray.files.paths import write_bytes
    from ldm_ray.metrics.evaluation import evaluate, write_json
    from ldm_ray.metrics.lenet import SHA256
    from ldm_ray.metrics.report import table

    base = outdir(config.outdir)
    device = pick_device(config.device)
    model = chosen(config, base)
    check_precision(config.precision, model.codec)
    sources, notes = load_own(model.info, model.path, config.dataset, cache_dir(config.cache_dir), model.only_digit)
    for folder in (base, output):
        runs.check_writable(folder)
    generator = Generator.of(model, device)
    found, picture = evaluate(config, generator, sources)
    found["notes"] = notes + found["notes"]
    about = {"checkpoint": {"path": model.path, "sha256": model.sha256}, "settings": config.to_dict()}
    write_json(output / "metrics.json", about | {"versions": versions(), "classifiers": SHA256} | found)
    write_bytes(output / "samples.png", encode_png(picture, {"checkpoint": model.sha256}))
    test = found["dataset"]["test"]
    print(f"{config.samples} images a row against the {test['count']} test images of {test['name']}; sampling seeds "
          f"{config.seeds}, mean ± sd\n\n{table(found)}\n")  # fmt: skip
    for note in found["notes"]:
        print(f"NOTE: {note}\n")
    print(f"metrics     {output / 'metrics.json'}")
    print(f"samples     {output / 'samples.png'}, each beside its nearest training image")
    return 0


if __name__ == "__main__":
    cli.run(main, PROG)
