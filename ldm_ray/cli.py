"""Flags from configuration fields, and a user's mistakes as one line with exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ldm_ray.errors import ConfigError, LdmError
from ldm_ray.options import Config, flag_of, kind_of

C = TypeVar("C", bound=Config)


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line, without the usage text around it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


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
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f'--config {path} is a JSON object of settings, such as {{"lr": 0.001}}')
    return values


def picture_path(given: str) -> Path:
    """``--output`` of a command that writes one picture. ConfigError unless it is a .png that is no folder."""
    output = Path(given).expanduser()
    if output.suffix.lower() != ".png":
        raise ConfigError(f"--output {output} is to be a .png file")
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; name a .png file in it")
    return output


def run(main: Callable[[], int | None], prog: str) -> NoReturn:
    """Runs a command: LdmError and unusable files become one line on stderr and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "datasets", "huggingface_hub", "filelock", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        code = main()
    except LdmError as error:
        code = fail(prog, str(error))
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 1
    except OSError as error:
        code = fail(prog, f"{error.filename}: {error.strerror}" if error.filename else str(error))
    sys.stdout.flush()
    sys.exit(code or 0)


def fail(prog: str, message: str) -> int:
    """Prints the message as one line on stderr; returns 2."""
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def close(outcome: Any, prog: str, then: str) -> int:
    """Says what a training command made and what comes next; returns its exit code."""
    paths = outcome.paths
    if outcome.code:
        print(f"stopped; go on with: {prog} --auto-resume (and the same settings)")
        return outcome.code
    print(f"checkpoint  {paths.latest}")
    print(f"records     {paths.runs}")
    print(f"next        {then} {shlex.quote(str(paths.latest))}")
    return 0
