"""What a denoiser predicts, as x0. Every kind is linear in (xt, output): x0 = a·xt + b·output.

With ᾱ of the timestep and xt = √ᾱ x0 + √(1 − ᾱ) ε (DDPM, arXiv:2006.11239, eq. 4).
"""

from __future__ import annotations

from ldm_ray.settings.diffusion import PREDICTION_TYPES
from ldm_ray.settings.errors import ConfigError


def x0_weights(prediction_type: str, alpha_cumprod: float) -> tuple[float, float]:
    """(a, b) of x0 = a·xt + b·output at a timestep's ᾱ. ConfigError on an unknown kind.

    ``epsilon``: the noise, x0 = (xt − √(1 − ᾱ) ε) / √ᾱ. ``v_prediction``: v = √ᾱ ε − √(1 − ᾱ) x0
    (Salimans and Ho, arXiv:2202.00512, appendix D), x0 = √ᾱ xt − √(1 − ᾱ) v. ``sample``: x0 itself.
    """
    signal, sigma = alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5
    if prediction_type == "epsilon":
        return 1 / signal, -sigma / signal
    if prediction_type == "v_prediction":
        return signal, -sigma
    if prediction_type == "sample":
        return 0.0, 1.0
    raise ConfigError(f"prediction type {prediction_type!r} is unknown; known are {', '.join(PREDICTION_TYPES)}")
