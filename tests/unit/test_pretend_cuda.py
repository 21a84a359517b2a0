"""The rehearsal of CUDA itself: what it refuses, what it counts as a wait, what it leaves as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers.pretend_cuda import Mismatch, OnCuda, pretending

CPU = torch.device("cpu")


def there(*shape: int) -> torch.Tensor:
    return torch.ones(shape or (3, 3), device="cuda")


def rows(device: str) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64, device=device)


HERE = torch.ones(3, 3)
REFUSED: dict[str, Callable[[], Any]] = {
    "a sum": lambda: there() + HERE,
    "a product": lambda: HERE @ there(),
    "a list": lambda: torch.cat([HERE, there()]),
    "in place": lambda: there().add_(HERE),
    "a loss": lambda: torch.nn.functional.mse_loss(there().requires_grad_(), HERE),
    "a layer of the CPU": lambda: torch.nn.Linear(3, 3)(there()),
    "an input of the CPU": lambda: torch.nn.Linear(3, 3).to("cuda")(HERE),
    "a generator of the CPU": lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
    "a generator of the GPU": lambda: torch.randn(3, generator=torch.Generator("cuda")),
    "an index of the GPU": lambda: HERE[rows("cuda")],
    "set at an index of the GPU": lambda: HERE.clone().__setitem__(rows("cuda"), 0.0),
    "set to values of the CPU": lambda: there().__setitem__(rows("cuda"), HERE[:1]),
    "numpy": lambda: there().numpy(),
    "pinned": lambda: there().pin_memory(),
}
WAITS: dict[str, Callable[[], Any]] = {
    "a number": lambda: there(1).item(),
    "a decision": lambda: bool(there(1)),
    "a list": lambda: there().tolist(),
    "to the CPU": lambda: there().cpu(),
    "to the CPU by name": lambda: there().to("cpu", non_blocking=True),
    "of numbers": lambda: torch.tensor([1.0, 2.0], device="cuda"),
    "like another": lambda: there().new_tensor([1.0]),
    "from the CPU": lambda: HERE.to("cuda"),
    "not pinned": lambda: HERE.to("cuda", non_blocking=True),
    "no longer pinned": lambda: HERE.pin_memory()[rows("cpu")].to("cuda", non_blocking=True),
    "pinned and waited for": lambda: HERE.pin_memory().to("cuda"),
    "a mask": lambda: there()[there() > 0],
    "an index of the CPU": lambda: there()[rows("cpu")],
    "a comparison": lambda: torch.equal(there(), there()),
    "a copy": lambda: there().copy_(HERE),
}
NO_WAITS: dict[str, Callable[[], Any]] = {
    "pinned": lambda: HERE.pin_memory().to("cuda", non_blocking=True),
    "gathered in pinned memory": lambda: torch.index_select(
        HERE, 0, rows("cpu"), out=torch.empty(1, 3, pin_memory=True)
    ).to("cuda", non_blocking=True),
    "filled": lambda: torch.full((2,), 3.0, device="cuda") + torch.arange(2, device="cuda"),
    "an index": lambda: there()[rows("cuda")],
    "set": lambda: there().__setitem__(rows("cuda"), 0.0),
    "a number of the CPU": lambda: there() * torch.tensor(2.0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_gpu_refuses_is_refused(name: str) -> None:
    with pretending(), pytest.raises((Mismatch, TypeError)):
        REFUSED[name]()


@pytest.mark.parametrize("name", [*WAITS, *NO_WAITS])
def test_waits_for_the_device_are_counted(name: str) -> None:
    with pretending() as seen:
        (WAITS | NO_WAITS)[name]()
        assert seen.waits.total() == (name in WAITS)


def test_tensors_say_where_they_are() -> None:
    with pretending():
        assert there().device == torch.device("cuda", 0) and there().is_cuda and not HERE.is_cuda
        assert (there() + 1).is_cuda and there().cpu().device == CPU
        layer = torch.nn.Linear(3, 3).to("cuda")
        layer(there()).sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.is_cuda
    assert not isinstance(torch.ones(1), OnCuda)
