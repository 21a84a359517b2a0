"""Gaussian mixtures: closed forms, recovery of what rows were drawn from, and scikit-learn beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from ldm_ray.metrics import mixture
from ldm_ray.metrics.mixture import fit


@pytest.fixture(scope="module")
def rows() -> Tensor:
    """(3000, 3) float32: a third around (2, 0, 0), narrow, the rest around (−1, 1, 0), slanted."""
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(3000, 3, generator=random)
    slanted = noise @ torch.tensor([[0.6, 0.3, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.9]])
    return torch.cat([0.2 * noise[:1000] + torch.tensor([2.0, 0, 0]), slanted[1000:] + torch.tensor([-1.0, 1, 0])])


def test_one_component_is_mean_and_covariance(rows: Tensor) -> None:
    found = fit(rows, 1, 0)
    torch.testing.assert_close(found.means[0], rows.double().mean(dim=0), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.covariances[0], torch.cov(rows.double().T, correction=0), atol=1e-5, rtol=0)
    assert found.weights.tolist() == [1.0]


def test_what_rows_were_drawn_from_is_found_and_drawn_again(rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    found = fit(rows, 2, 0, lambda: steps.append(1))
    narrow = int(found.means[:, 0].argmax())
    assert found.weights[narrow] == pytest.approx(1 / 3, abs=0.002) and 1 < len(steps) < 20
    torch.testing.assert_close(found.means[narrow].float(), rows[:1000].mean(dim=0), atol=0.01, rtol=0)
    torch.testing.assert_close(found.covariances[1 - narrow].float(), torch.cov(rows[1000:].T), atol=0.02, rtol=0)
    drawn = found.sample(200_000, 7)
    assert drawn.dtype == torch.float32 and torch.equal(drawn[:9], found.sample(200_000, 7)[:9])
    torch.testing.assert_close(drawn.mean(dim=0), rows.mean(dim=0), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(drawn.T), torch.cov(rows.T), atol=0.03, rtol=0)
    monkeypatch.setattr(mixture, "BLOCK", 2000)  # 80 rows at a time
    again = fit(rows, 2, 0)
    torch.testing.assert_close(again.means, found.means, atol=1e-4, rtol=0)


def test_it_is_as_likely_as_scikit_learns(rows: Tensor) -> None:
    theirs = GaussianMixture(4, random_state=0, max_iter=200).fit(rows.double().numpy())
    assert fit(rows, 4, 0).likelihood > theirs.score(rows.double().numpy()) - 0.01


def test_rows_without_spread_have_a_mixture_all_the_same() -> None:
    flat = torch.zeros(100, 3)
    flat[:, 0] = torch.linspace(-1, 1, 100)
    found = fit(flat, 3, 0)
    assert np.isfinite(found.sample(50, 0).numpy()).all() and float(found.values.min()) == mixture.SMALLEST
