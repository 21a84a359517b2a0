"""Which device computes, and with how many threads."""

from __future__ import annotations

import pytest

from ldm_ray.devices.device import cpu_threads


@pytest.mark.parametrize(
    ("setting", "threads"), [(None, 4), ("", 4), ("1", 1), ("2,1", 2), ("16", 4), ("0", 4), ("-1", 4), ("many", 4)]
)
def test_threads_are_one_a_core_unless_openmp_is_told_otherwise(
    setting: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if setting is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    assert cpu_threads(4) == threads
