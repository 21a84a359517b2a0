"""What a denoiser can be: where it diffuses, its noise schedule, what it predicts, and how large it may be."""

from __future__ import annotations

from typing import Any

from ldm_ray.settings.errors import ConfigError

SPACES = ("latent", "pixel")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETAS = (1e-4, 2e-2)  # published
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
NUM_BLOCKS = 4  # of the denoiser, as published
EMBEDDING_DIM = 256
MAX_BLOCKS, MAX_HIDDEN = 64, 8192
MAX_TABLES = 2**26  # numbers
MAX_PARAMETERS = 3 * 2**26  # of a network that is read again


def check_tables(timesteps: int, num_blocks: int, hidden_dim: int, embedding_dim: int = EMBEDDING_DIM) -> None:
    """ConfigError unless a denoiser's tables for sampling, T × 2·blocks × 2·hidden numbers, can be made quickly."""
    size = 4 * timesteps * num_blocks * hidden_dim
    if not (1 <= num_blocks <= MAX_BLOCKS and 1 <= hidden_dim <= MAX_HIDDEN) or size > MAX_TABLES:
        raise ConfigError(
            f"T {timesteps} × {num_blocks} blocks × hidden size {hidden_dim}: at most {MAX_BLOCKS} blocks, a hidden "
            f"size of {MAX_HIDDEN}, and {MAX_TABLES // 4:,} for the product are possible"
        )
    if 2 * num_blocks * hidden_dim * (hidden_dim + 2 * embedding_dim) > MAX_PARAMETERS:
        raise ConfigError(
            f"{num_blocks} blocks of hidden size {hidden_dim} have more than {MAX_PARAMETERS:,} weights, the most that "
            "a checkpoint may have"
        )
    if size * embedding_dim > MAX_TABLES * 2 * EMBEDDING_DIM:
        raise ConfigError(f"an embedding of {embedding_dim} numbers is too long for tables of that size")


def canonical(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of a denoiser's settings that have an effect: a squaredcos_cap_v2 schedule goes by T alone."""
    idle = ("beta_start", "beta_end") if settings.get("beta_schedule") == "squaredcos_cap_v2" else ()
    return {name: value for name, value in settings.items() if name not in idle}
