"""Searches noise schedule and learning rate: many short trainings over the same latents, on Ray Tune.

  python tune/search.py                                        32 trials, Optuna with early stopping
  python tune/search.py --lr 1e-4:1e-2 --beta-schedule linear --num-samples 64 --time-budget 30m --train-best
  python tune/search.py --search grid --lr 1e-3,3e-3 --batch-size 128,512
  python tune/search.py --resume                               go on where the last search stopped

A trial trains as ldm_ray.train does and is scored by the class-wise Fréchet distance between latents that it
samples and held-out ones, which noise schedules share; smaller is better. Ctrl-C, SIGTERM and SIGUSR1 stop the
search with what it has; the exit code is then 128 + the signal's number.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the package beside this file, installed or not; Ray's workers go by PYTHONPATH
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[1], os.environ.get("PYTHONPATH")]))

from ldm_ray.files.hold import hold, new_folder
from ldm_ray.files.paths import outdir, to_path, write_bytes
from ldm_ray.search.records import Records, SearchPaths, best_config, read_search, table
from ldm_ray.search.space import SearchConfig
from ldm_ray.settings.errors import ConfigError, LdmError
from ldm_ray.settings.training import TrainConfig
from ldm_ray.terminal import cli, flags

PROG = "python tune/search.py"
log = logging.getLogger("ldm_ray.tune")


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    config = flags.parse_config(SearchConfig, flags.Parser(prog=PROG, description=__doc__), given)
    from ldm_ray.checkpoints import runs

    base = outdir(config.outdir)
    if not isinstance(base, Path):
        raise ConfigError(
            f"--outdir {base} is no folder: a search is kept in a folder that all nodes see (NFS, EFS, Filestore); "
            "its --ae-ckpt may be in an object store"
        )
    runs.check_writable(base)
    with contextlib.ExitStack() as held:
        return run(config, base, paths_of(config, base, held), given)


def run(config: SearchConfig, base: Path, paths: SearchPaths, given: list[str]) -> int:
    """The search in its folder; its exit code. given: the command's arguments."""
    here = f"python {shlex.quote(os.path.relpath(__file__))}"
    go_on = f"stopped; go on with: {cli.again(here, given, config, '--resume')}"
    from ldm_ray.distributed import pipeline
    from ldm_ray.distributed.cluster import connected

    train = config.train_config(auto_resume=config.resume)  # of an autoencoder that a stop has left unfinished
    autoencoder = pipeline.autoencoder_of(train, base)
    with connected():
        latents = pipeline.latents_of(train, base, autoencoder)
        if isinstance(latents, pipeline.Outcome):
            print(go_on)
            return latents.code
        trained, code = search(config, paths, latents, base)
        if code:
            print(go_on)
        if code or trained is None:
            return code
        training = ["--config", str(paths.best_config)]
        print(f"next        {cli.runnable('python -m ldm_ray.train')} {shlex.join(training)}")
        if config.train_best:
            outcome = pipeline.train(trained)
            return cli.close(outcome, "python -m ldm_ray.train", "python -m ldm_ray.infer --ckpt", training, trained)
    return 0


def search(config: SearchConfig, paths: SearchPaths, latents: Any, base: Path) -> tuple[TrainConfig | None, int]:
    """Runs the trials that are left and writes what came out: (the best configuration, the exit code).

    latents: of ``pipeline.latents_of``. Raises LdmError when every trial failed.
    """
    from ldm_ray.checkpoints import checkpoint
    from ldm_ray.data.identity import record_of
    from ldm_ray.distributed.search import Engine

    data = record_of(latents.source, latents.autoencoder.sha256)
    records = records_of(config, paths, data)
    engine = Engine(config, paths, latents)
    state = {"config": config.to_dict(), "data": data, "floor": engine.floor, "versions": checkpoint.versions()}
    write_bytes(paths.search, (json.dumps(state, indent=1) + "\n").encode())
    code = engine.run(records)
    best = records.best
    if best is None:
        failed = [trial for trial in records.trials if trial.status == "failed"]
        if code:
            return None, code
        if failed:
            raise LdmError(f"all {len(failed)} trials failed; the first: {failed[0].reason} ({paths.trials})")
        raise LdmError(f"no trial finished an epoch within the --time-budget of {config.time_budget}: give it more")
    fixed = {"dataset": latents.source.name, "ae_ckpt": str(to_path(latents.autoencoder.path).absolute())}
    if config.outdir:
        fixed["outdir"] = str(base)
    trained = config.train_config(**{**fixed, **best.settings, "epochs": config.train_epochs})
    write_bytes(paths.best_config, (json.dumps(best_config(trained, best.settings), indent=1) + "\n").encode())
    show(paths, records, engine.floor, config)
    return trained, code


def show(paths: SearchPaths, records: Records, floor: float, config: SearchConfig) -> None:
    """Prints the table and the files, after drawing the pictures."""
    from ldm_ray.search.pictures import draw

    text = table(records.ranked(), floor)
    write_bytes(paths.table, (text + "\n").encode())
    print(text)
    for trial in records.trials:
        if trial.status == "failed":
            print(f"trial {trial.number} failed: {trial.reason}")
    pictures = draw(paths, records.trials, floor, config.num_train_timesteps)
    print(f"pictures    {', '.join(file.name for file in pictures)} in {paths.folder}")
    print(f"trials      {paths.trials}")
    print(f"best        {paths.best_config}")


def paths_of(config: SearchConfig, base: Path, held: contextlib.ExitStack) -> SearchPaths:
    """The folder of a new search, or of the one to go on with: ``--name``, or the newest. ConfigError otherwise.

    It is held until the stack closes.
    """
    from ldm_ray.checkpoints import runs

    folder = base / "tune"
    if config.resume:
        pattern = f"{config.name or '*'}/search.json"
        for newest in runs.newest_first(folder.glob(pattern)):
            held.enter_context(hold(newest.parent))
            return SearchPaths(Path(str(newest.parent)))
        log.info("--resume: no search in %s; starting a new one", folder / (config.name or ""))
    if config.name is None:
        return SearchPaths(Path(str(new_folder(folder, "search", held))))
    paths = SearchPaths(folder / config.name)
    held.enter_context(hold(paths.folder))
    if paths.search.exists():
        raise ConfigError(f"{paths.folder} is there already: --resume goes on with it, another --name is a new search")
    return paths


def records_of(config: SearchConfig, paths: SearchPaths, data: dict[str, Any]) -> Records:
    """Of a new search, or those to go on from. ConfigError when the earlier search was another one."""
    if not paths.search.exists():
        return Records(paths.trials, [])
    from ldm_ray.data.identity import changes

    before = read_search(paths)
    changed = config.differences(before["config"]) + changes(before["data"], data)
    if changed:
        raise ConfigError(
            f"--resume: {paths.folder.name} is another search ({'; '.join(changed)}); give the same settings, "
            "another --name, or leave --resume out for a new search"
        )
    records = Records.read(paths.trials)
    log.info("going on with %s: %d trials are settled", paths.folder.name, len(records.settled))
    return records


if __name__ == "__main__":
    cli.run(main, PROG)
