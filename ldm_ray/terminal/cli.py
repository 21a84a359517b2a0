"""A command from its start to its exit code: a user's mistakes are one line and exit code 2."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ldm_ray.files.paths import local_path
from ldm_ray.settings.errors import ConfigError, LdmError
from ldm_ray.terminal import streams


def picture_path(given: str) -> Path:
    """``--output`` of a command that writes one picture. ConfigError unless it is a .png that is no folder."""
    output = local_path(given)
    if output.suffix.lower() != ".png":
        raise ConfigError(f"--output {output} is to be a .png file")
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; name a .png file in it")
    check_place(output)
    return output


def folder_path(given: str) -> Path:
    """``--output`` of a command that writes a folder. ConfigError where it is a file, or is in no folder."""
    output = local_path(given)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file; needed is a folder, there or not")
    check_place(output)
    return output


def check_place(output: Path) -> None:
    """ConfigError unless the folder that ``--output`` is to be in is there: a slip of the pen makes no folders."""
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}; make it first, or name another")


def run(main: Callable[[], int | None], prog: str) -> NoReturn:
    """Runs a command: LdmError, and whatever the system refuses of a file, become one line on stderr and exit code 2.

    Standard streams that are closed or broken change nothing; one cut short by a full disk is such a refusal.
    """
    streams.prepare()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.raiseExceptions = False  # a log file on a full disk ends nothing and prints no traceback
    for noisy in ("httpx", "httpx2", "datasets", "huggingface_hub", "filelock", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        code = main()
    except LdmError as error:
        code = fail(prog, str(error))
    except OSError as error:
        code = fail(prog, refused(error))
    except KeyboardInterrupt:
        code = 130
    if (short := streams.full()) and not code:
        code = fail(prog, f"standard output: {short.strerror}; the command itself came to its end")
    sys.exit(code or 0)


def refused(error: OSError) -> str:
    """The file and the system's reason."""
    files = " to ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    reason = error.strerror or str(error) or type(error).__name__
    if isinstance(error, FileExistsError) and files:
        reason = "it is there and is no folder"
    return f"{files}: {reason}" if files else reason


def fail(prog: str, message: str) -> int:
    """Prints the message as one line on stderr; returns 2."""
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def close(outcome: Any, prog: str, then: str, given: Sequence[str], config: Any) -> int:
    """Says what a training command made and what comes next; returns its exit code.

    given: the command's arguments, from which config was made.
    """
    paths = outcome.paths
    if outcome.code:
        print(f"stopped; go on with: {again(prog, given, config)}")
        return outcome.code
    print(f"checkpoint  {paths.latest}")
    print(f"records     {paths.runs}")
    print(f"next        {runnable(then)} {shlex.quote(str(paths.latest))}")
    return 0


def again(prog: str, given: Sequence[str], config: Any, resume: str = "--auto-resume") -> str:
    """The line that goes on with a stopped command, in the folder where it was given: to be copied into a shell."""
    more = [resume] if resume not in given or f"--no-{resume.lstrip('-')}" in given else []
    if config.outdir is None and (scratch := os.environ.get("SCRATCH")):
        more += ["--outdir", scratch]  # it may have been set for that command alone
    return f"{runnable(prog)} {shlex.join([*given, *more])}"


def runnable(command: str) -> str:
    """A command that begins with "python" for a shell whose "python" may be another than this one, or missing."""
    path, here = shutil.which("python"), os.getcwd()
    if path and os.path.abspath(path) == sys.executable:
        return command
    inside = sys.executable.startswith(os.path.join(here, ""))
    python = os.path.relpath(sys.executable, here) if inside else sys.executable
    return shlex.quote(python) + command.removeprefix("python")
