"""The mathematics knows nothing of Ray, and importing the package writes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.data import ROOT


def modules() -> list[str]:
    """Every module of the package outside ``distributed/``."""
    files = sorted((ROOT / "ldm_ray").rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return [name for name in names if not name.startswith("ldm_ray.distributed")]


def python(code: str, folder: Path) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"SCRATCH": str(folder / "scratch"), "SLURM_TMPDIR": str(folder / "tmp")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_mathematics_does_not_import_ray_and_writes_nothing(tmp_path: Path) -> None:
    names = modules()
    assert len(names) > 60 and {"ldm_ray.train", "ldm_ray.diffusion.samplers"} < set(names)
    shown = python(
        f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('ray', 'datasets', 'diffusers')])",
        tmp_path,
    )
    assert shown == "[]\n"
    assert list(tmp_path.iterdir()) == []


def test_help_is_fast(tmp_path: Path) -> None:
    """No command needs torch, Ray or pandas to say its flags."""
    names = [f"ldm_ray.{file.stem}" for file in (ROOT / "ldm_ray").glob("*.py") if "PROG = " in file.read_text()]
    assert len(names) == 9
    shown = python(
        f"import contextlib, importlib, sys\nfor name in {[*names, 'tune.search']!r}:\n"
        "    with contextlib.suppress(SystemExit):\n        importlib.import_module(name).main(['--help'])\n"
        "print({'torch', 'ray', 'pandas'} & set(sys.modules))",
        tmp_path,
    )
    assert shown.count("usage: ") == 10 and shown.endswith("\nset()\n")


def test_the_package_alone_imports_nothing_heavy(tmp_path: Path) -> None:
    shown = python("import ldm_ray, sys; print(ldm_ray.__version__, {'torch', 'ray'} & set(sys.modules))", tmp_path)
    assert shown.split()[1] == "set()" and shown[0].isdigit()
    assert list(tmp_path.iterdir()) == []
