"""Commands in processes of their own that are measured from outside: ``python -m tests.helpers.bounded``.

The package is imported once; each command is a fork of that process, so that only what the command does counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.data import ROOT

KILLED_AFTER_S = 120


@dataclass(frozen=True)
class Outcome:
    """cpu_s: seconds of the processor, user and system; mb: memory at most, of the whole process."""

    code: int
    output: str
    errors: str
    cpu_s: float
    mb: float


def outcomes(commands: Sequence[Sequence[str]], folder: Path) -> list[Outcome]:
    """Of each command, a module's name and its arguments, with the folder as working directory."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SCRATCH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.bounded"],
        input=json.dumps([list(command) for command in commands]),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=KILLED_AFTER_S * len(commands),
    )
    assert done.returncode == 0, done.stderr
    return [Outcome(**line) for line in json.loads(done.stdout.splitlines()[-1])]


def measured(module: str, argv: Sequence[str]) -> dict[str, object]:
    """Runs ``module.main(argv)`` as its command would, in a fork."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = os.fork()
        if process == 0:
            signal.alarm(KILLED_AFTER_S)  # ends it, and then code says so
            os.dup2(output.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            code: int | str | None = 70
            try:
                from importlib import import_module

                from ldm_ray.terminal import cli

                command = import_module(module)
                with contextlib.suppress(SystemExit):
                    try:
                        cli.run(lambda: command.main(argv), module)
                    except SystemExit as ended:
                        code = ended.code
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
        _, status, used = os.wait4(process, 0)
        texts = {}
        for name, stream in ("output", output), ("errors", errors):
            stream.seek(0)
            texts[name] = stream.read()
    peak = used.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "cpu_s": used.ru_utime + used.ru_stime, "mb": peak, **texts}


if __name__ == "__main__":
    import ldm_ray.engine.generator
    import ldm_ray.infer
    import ldm_ray.inspect  # noqa: F401

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps([measured(module, argv) for module, *argv in json.load(sys.stdin)]))
