"""How Ray shares GPUs out, and the flags that say so."""

from __future__ import annotations

from typing import Any

from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.options import option

UNITS = 10_000  # Ray counts in these parts of a GPU
MOST = 64  # GPUs of one worker


def check_share(name: str, gpus: float) -> None:
    """ConfigError unless Ray can give so many GPUs to a worker. name: of the flag or argument."""
    if gpus != (round(gpus) if gpus > 1 else round(gpus * UNITS) / UNITS):
        raise ConfigError(
            f"{name} is a share of a GPU up to 1 with at most four decimals, or a whole number, not {gpus}"
        )


def fitting(gpus: int, share: float) -> int:
    """How many workers of a share above 0 Ray places on so many GPUs of one machine: a share up to 1 lies on one GPU,
    and Ray counts in ten-thousandths, so 0.2 fits five times and 0.3 three times."""
    return gpus * (UNITS // round(share * UNITS)) if share <= 1 else gpus // round(share)


def gpus_option(whose: str, default: str = "1", **rules: Any) -> Any:
    """A field with the GPUs of one worker."""
    text = f"GPUs of {whose}: a share such as 0.5, or a whole number [{default} where there are GPUs]"
    return option(None, text, **{"above": 0, "high": MOST, "check": check_share, "resume": "free", **rules})


def accelerator_option() -> Any:
    """A field with the type of GPU that workers take."""
    return option(None, "type of GPU that workers take, as Ray names it: L4, A10G, H100 … [any]", resume="free")
