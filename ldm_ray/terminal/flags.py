"""Flags from the fields of a group of settings, and what a command line and ``--config`` say read into one."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from ldm_ray.files.paths import local_path
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.options import Config, flag_of, kind_of

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
    """Adds one flag per field; a flag left out stays out of the namespace."""
    for field in dataclasses.fields(config):
        kind, flag = kind_of(field), "--" + flag_of(field)
        text, default = field.metadata["help"].replace("%", "%%"), config.default_text(field)
        text += f" [{default}]" if default else ""
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
    flags = vars(parser.parse_args(argv))
    path = flags.pop("config")
    settings = config.by_field(read_json(path), path) if path else {}
    return config(**{**settings, **flags})


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
