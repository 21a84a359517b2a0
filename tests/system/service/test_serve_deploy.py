"""``serve deploy`` against a plain ``serve run``, as docs/service.md has it: another checkpoint without a restart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from ldm_ray.engine.generator import Generator
from tests.helpers.data import ROOT
from tests.helpers.service import Server


def test_serve_deploy_changes_the_checkpoint_with_rays_token(server: Server, tmp_path: Path) -> None:
    other = server.ckpt.parents[1] / "latent-diffusion-other" / "latest.pt"
    file = tmp_path / "config.json"

    def deploy(ckpt: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        config = json.loads(server.config.read_text())
        config["applications"][0]["deployments"] = [{"name": "images", "user_config": {"ckpt": str(ckpt)}}]
        file.write_text(json.dumps(config))
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(file), "-a", server.dashboard]
        kept = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
        return subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=120)

    def serving(name: str) -> None:
        for _ in range(240):
            if server.ask("/ready").json["model"] == name:
                return
            time.sleep(0.25)
        raise AssertionError(f"{name} is not served")

    refused = deploy(other)
    assert refused.returncode and "uthentication is enabled" in refused.stderr
    try:
        sent = deploy(other, RAY_AUTH_MODE="token")
        assert sent.returncode == 0, sent.stderr[-2000:]
        serving("latent-diffusion-other")
        wanted = Generator.open(other)([1], [1])[:, 0].numpy()
        np.testing.assert_array_equal(server.images(seed=1, prompt="1"), wanted)
    finally:
        deploy(server.ckpt, RAY_AUTH_MODE="token")
        serving("latent-diffusion-main")
