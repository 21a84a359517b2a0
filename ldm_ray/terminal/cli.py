"""Flags from configuration fields, and a user's mistakes as one line with exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ldm_ray.files.paths import local_path
from ldm_ray.settings.errors import ConfigError, LdmError
from ldm_ray.settings.options import Config, flag_of, kind_of
from ldm_ray.terminal import streams

C = TypeVar("C", bound=Config)


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line, without the usage text around it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; of a flag that is not known, the one that it resembles is named."""
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{self.resembling(rest)}")
        return known

    def resembling(self, rest: Sequence[str]) -> str:
        """The question after the flag that the first unknown one may have been meant for, or nothing."""
        flags = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        word = next((word.partition("=")[0].strip("-") for word in rest if word.startswith("-")), "").replace("_", "-")
        near = difflib.get_close_matches(word, flags, 1, 0.7) or [f for f in flags if len(word) > 2 and word in f]
        return f"; did you mean --{near[0]}?" if near else ""


def number(kind: type) -> Callable[[str], Any]:
    """A flag's text to int or float; whole numbers may be written 1_000 or 1e3."""

    def parse(text: str) -> Any:
        try:
            if kind is int and not text.replace("_", "").lstrip("+-").isdigit():
                value = float(text)
                return int(value) if value.is_integer() else text
            return kind(text)
        except (ValueError, OverflowError):
            return text  # check_value says what is allowed

    return parse


def add_flags(parser: argparse.ArgumentParser, config: type[Config]) -> None:
    """Adds one flag per field; what is not given stays out of the namespace."""
    for field in dataclasses.fields(config):
        kind, flag = kind_of(field), "--" + flag_of(field)
        text = field.metadata["help"].replace("%", "%%")
        if field.default is not None and kind is not bool:
            text += f" [{field.default:g}]" if kind is float else f" [{field.default}]"
        recipes = field.metadata.get("recipes", {})
        if len(set(recipes.values())) == 1:
            text += f" [{next(iter(recipes.values()))}]"
        elif recipes:
            text += f" [{'; '.join(f'{name}: {value}' for name, value in recipes.items())}]"
        settings: dict[str, Any] = {"dest": field.name, "help": text, "default": argparse.SUPPRESS}
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        else:
            choices = field.metadata.get("choices")
            metavar = "|".join(map(str, choices)) if choices else {int: "N", float: "X"}.get(kind, "TEXT")
            if field.metadata.get("many"):
                settings |= {"action": "extend", "nargs": "+"}
            parser.add_argument(flag, type=str if kind is str else number(kind), metavar=metavar, **settings)


def parse_config(config: type[C], parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> C:
    """Reads flags over an optional ``--config FILE`` of the same names. ConfigError on a wrong value."""
    parser.add_argument("--config", metavar="FILE", help="JSON file of these settings; flags win over it")
    add_flags(parser, config)
    given = vars(parser.parse_args(argv))
    path = given.pop("config")
    values = config.by_field(read_json(path), path) if path else {}
    return config(**{**values, **given})


def read_json(path: str) -> dict[str, Any]:
    """A JSON object from a file. ConfigError when it cannot be read as one."""
    try:
        values = json.loads(local_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f'--config {path} is a JSON object of settings, such as {{"lr": 0.001}}')
    return values


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
