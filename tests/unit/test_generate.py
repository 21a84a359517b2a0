"""``python -m ldm_ray.generate``: what it refuses before it starts Ray."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ldm_ray.files.hold import hold
from tests.helpers.checkpoints import write_small_checkpoint
from tests.helpers.commands import refusal, run


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory, ae_file: Path) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("denoiser") / "latest.pt", ae_file)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seeds", "5-3"], "--seeds 5-3: a range rises"),
        (["--seeds", "a"], "'a' is neither"),
        (["--labels", "11"], "--labels 11: a range rises, and a label is 0 to 9"),
        (["--labels", "seven,cat"], "--labels seven,cat: 'cat' is no class of the model"),
        (["--requests", "test_generate.py", "--output", "no/such/x.jsonl"], "there is no folder no/such"),
        (["--label", "7"], "did you mean --labels?"),
        (["--outdir", "nowhere://x"], "nowhere://x cannot be opened by pyarrow"),
        (["--num-inference-steps", "1001"], "this model has 1000 timesteps"),
        (["verify", "."], "is no dataset"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    flags: list[str], said: str, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    words = flags if flags[0] == "verify" else ["--ckpt", ckpt, "--outdir", tmp_path / "x", *flags]
    assert said in refusal("generate", *words)
    assert not (tmp_path / "x").exists()


def test_a_folder_that_another_command_fills_is_refused(ckpt: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    with hold(out):
        said = refusal("generate", "--ckpt", ckpt, "--seeds", "0-9", "--outdir", out)
        assert f"{out} is in use by process {os.getpid()}" in said
        assert "10 images" in run("generate", "--ckpt", ckpt, "--seeds", "0-9", "--outdir", out, "--dry-run")
        assert [file.name for file in out.iterdir()] == [".held"]
