"""The mechanism of configurations: frozen dataclasses whose fields carry the flag, the bounds and the help."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_ray.settings.errors import ConfigError

KINDS: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str}


def option(default: Any, help: str, **rules: Any) -> Any:
    """A dataclass field with what its flag needs.

    rules: ``flag`` (name, when not the field's), ``low``, ``high`` (inclusive), ``above``, ``below`` (exclusive),
    ``choices``, ``many`` (up to so many values, as a tuple), ``check`` (a function of the flag and the value that
    refuses it), ``resume`` ("free": may change between the stop and the resume of a run). The type is that of the
    field's annotation.
    """
    return dataclasses.field(default=default, metadata={"help": help, **rules})


def flag_of(field: dataclasses.Field) -> str:
    """The field's flag without dashes in front, for example ``batch-size``."""
    return field.metadata.get("flag", field.name.replace("_", "-"))


def kind_of(field: dataclasses.Field) -> type:
    """int, float, str or bool: the one in the field's annotation, such as ``tuple[str, ...] | None``."""
    return next(KINDS[word] for word in re.findall(r"\w+", str(field.type)) if word in KINDS)


def check_value(field: dataclasses.Field, value: Any) -> Any:
    """The value in its field's type, or ConfigError with what is allowed."""
    if value is None and field.default is None:
        return None
    if field.metadata.get("many"):
        return check_many(field, value)
    return check_one(field, value)


def check_many(field: dataclasses.Field, value: Any) -> tuple[Any, ...]:
    """Each of one value or several, in their type."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    most = field.metadata["many"]
    if not 1 <= len(values) <= most:
        raise ConfigError(f"--{flag_of(field)} takes 1 to {most} values, not {len(values)}")
    return tuple(check_one(field, each) for each in values)


def check_one(field: dataclasses.Field, value: Any) -> Any:
    """As ``check_value``, of a value that is there."""
    rules, kind, name = field.metadata, kind_of(field), f"--{flag_of(field)}"
    if kind is bool and not isinstance(value, bool):
        raise ConfigError(f"{name} is true or false, not {value!r}")
    if kind is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise ConfigError(f"{name} is a whole number, not {value!r}")
    if kind is float:
        text, value = repr(value), as_float(value)
        if not math.isfinite(value):
            raise ConfigError(f"{name} is a finite number, not {text}")
    if kind is str:
        if not isinstance(value, (str, int, Path)) or isinstance(value, bool) or str(value) == "":
            raise ConfigError(f"{name} is a text that is not empty, not {value!r}")
        value = str(value)
    if "choices" in rules and value not in rules["choices"]:
        raise ConfigError(f"{name} is one of {', '.join(map(str, rules['choices']))}, not {value!r}")
    low, high, above, below = (rules.get(k) for k in ("low", "high", "above", "below"))
    if (low is not None and value < low) or (above is not None and value <= above):
        raise ConfigError(f"{name} is {f'at least {low}' if low is not None else f'above {above}'}, not {value}")
    if (high is not None and value > high) or (below is not None and value >= below):
        raise ConfigError(f"{name} is {f'at most {high}' if high is not None else f'below {below}'}, not {value}")
    if "check" in rules:
        rules["check"](name, value)
    return value


def as_float(value: Any) -> float:
    """A number as a float; what is none, or is too large for one, as NaN."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    return math.nan


@dataclass(frozen=True, kw_only=True)
class Config:
    """A group of settings that is checked when it is made; subclasses add the fields."""

    def __post_init__(self) -> None:
        defaults = self.defaults()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value = defaults.get(field.name) if value is None else value
            object.__setattr__(self, field.name, check_value(field, value))

    def defaults(self) -> dict[str, Any]:
        """Defaults that go by another setting, of fields whose own default is None."""
        return {}

    @classmethod
    def default_text(cls, field: dataclasses.Field) -> str:
        """A field's default as ``--help`` adds it to the text; empty where the text says it, or there is no need."""
        if field.default is None or kind_of(field) is bool:
            return ""
        return f"{field.default:g}" if kind_of(field) is float else str(field.default)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def by_field(cls, values: dict[str, Any], source: str) -> dict[str, Any]:
        """The values, unchecked, of names of flags (``T``, ``batch-size``) or of fields, by the names of the fields.

        Raises ConfigError on unknown names, with the source that has them.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        by_flag = {flag_of(field).replace("-", "_"): name for name, field in fields.items()}
        settings: dict[str, Any] = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            name = name if name in fields else by_flag.get(name, "")
            if not name:
                known = ", ".join(sorted(by_flag))
                raise ConfigError(f"{source} has an unknown setting {key!r}; known are: {known}")
            settings[name] = value
        return settings

    def differences(self, other: dict[str, Any]) -> list[str]:
        """What differs from a recorded run in the settings that a resume may not change."""
        return [
            f"--{flag_of(field)} {other[field.name]} then, {getattr(self, field.name)} now"
            for field in dataclasses.fields(self)
            if field.metadata.get("resume") != "free"
            and field.name in other
            and getattr(self, field.name) != other[field.name]
        ]
