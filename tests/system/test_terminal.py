"""Commands on a terminal: their own progress, and nothing of Ray's."""

from __future__ import annotations

import os
from pathlib import Path

from tests.helpers.commands import start
from tests.helpers.data import ROOT

COMMANDS = """
import pathlib, sys
sys.path.insert(1, "tune")
import search
from ldm_ray import generate, train
from ldm_ray.distributed.cluster import connected
folder, out, ae = sys.argv[1:]
assert sys.stdout.isatty() and sys.stderr.isatty()
flags = ["--dataset", folder, "--outdir", out, "--ae-ckpt", ae, "--device", "cpu", "--T", "10", "--hidden-dim", "32"]
with connected():  # one start of Ray for all
    train.main([*flags, "--epochs", "1"])
    ckpt = next(pathlib.Path(out).glob("checkpoints/*/latest.pt"))
    generate.main(["--ckpt", str(ckpt), "--outdir", out + "/set", "--seeds", "0-9", "--device", "cpu"])
    search.main([*flags, "--seed", "1", "--val-fraction", "0.2", "--num-samples", "1", "--epochs", "1"])
"""
OF_RAY_DATA = ("Running Dataset", "MapBatches", "ReadBatches", "Tasks:", "Actors:", "Queued", "dataset_", "row/s")


def test_no_progress_of_rays_own(digits_folder: Path, ae_file: Path, tmp_path: Path) -> None:
    master, terminal = os.openpty()
    shown = b""
    process = start(
        "-c", COMMANDS, digits_folder, tmp_path / "out", ae_file, stdout=terminal, stderr=terminal, cwd=ROOT
    )
    os.close(terminal)
    try:
        while part := os.read(master, 1 << 16):
            shown += part
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(master)
    text = shown.decode()
    assert process.wait(60) == 0, text
    assert "encoding latents" in text and "step 1/1" in text and "images/s" in text and "best " in text
    assert not [word for word in OF_RAY_DATA if word in text], text
