"""The training loop of one worker.

Everything random in step s of epoch e follows from (seed, e, s, rank) alone, so that a resumed run needs no
generator state and goes on bit for bit. N rows of this worker, B rows of a step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm_ray.devices.device import autocast, picked, sent, settle
from ldm_ray.diffusion.ema import EMA
from ldm_ray.settings.training import RunConfig
from ldm_ray.training.tasks import Task

VAL_BATCH = 2048
WARM_UP, WARM_UP_STEPS = 0.05, 300  # share of the steps, and at least so many, up to half of them
RESIDENT_SHARE = 0.5  # of the device's free memory that training data may take


class Fitter:
    """data (N, …) and labels (N,) are this worker's shard; every worker takes ``steps_per_epoch`` steps of
    ``batch`` rows whatever its shard's size, going around again where the shard is short."""

    def __init__(
        self,
        task: Task,
        forward: nn.Module,
        config: RunConfig,
        data: Tensor,
        labels: Tensor,
        total_rows: int,
        rank: int,
        world: int,
        device: torch.device,
    ) -> None:
        self.task, self.forward, self.config, self.rank = task, forward, config, rank
        self.device = settle(device, training=True)
        self.data = resident(data, device)
        self.labels = labels.to(self.data.device)  # beside them
        self.batch = min(config.batch_size // world + (rank < config.batch_size % world), total_rows)
        self.steps_per_epoch = math.ceil(total_rows / config.batch_size)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        fused, decay = device.type in ("cpu", "cuda"), config.weight_decay
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=decay, fused=fused)
        self.context, self.scaler = autocast(device, config.amp)
        self.ema = EMA(task.model, task.ema_decay) if task.ema_decay else None
        self.generator = torch.Generator(device)
        self.epoch = 0  #       finished epochs
        self.step = 0  #        finished steps of the epoch after them
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.loss_sum = torch.zeros((), dtype=exact, device=device)  # of those steps

    @property
    def averaged(self) -> nn.Module:
        """The weights to sample with."""
        return self.ema.model if self.ema else self.task.model

    @property
    def global_step(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    def order(self) -> Tensor:
        """(steps·B,) rows of this epoch: a permutation, repeated where it is short."""
        generator = torch.Generator().manual_seed(mix(self.config.seed, self.epoch, -1, self.rank))
        needed = self.steps_per_epoch * self.batch
        rounds = [torch.randperm(len(self.data), generator=generator) for _ in range(-(-needed // len(self.data)))]
        return torch.cat(rounds)[:needed]

    def run_epoch(self, pause: Callable[[int], bool]) -> bool:
        """Finishes the current epoch; False when ``pause(step)``, asked after every step, stopped it before."""
        order = sent(self.order(), self.data.device)
        while self.step < self.steps_per_epoch:
            rows = order[self.step * self.batch : (self.step + 1) * self.batch]
            self.loss_sum += self.train_step(rows)
            self.step += 1
            if pause(self.step) and self.step < self.steps_per_epoch:
                return False
        return True

    def train_step(self, rows: Tensor) -> Tensor:
        """One optimiser step on the given rows of the shard, which lie where ``data`` do; returns the loss, detached.
        Nothing in it waits for the device."""
        self.generator.manual_seed(mix(self.config.seed, self.epoch, self.step, self.rank))
        batch, labels = (picked(part, rows, self.device) for part in (self.data, self.labels))
        factor = lr_factor(self.config.lr_schedule, self.global_step + 1, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor
        with self.context:
            loss = self.task.loss(self.forward, batch, labels, self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.config.grad_clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            self.ema.update()
        return loss.detach()

    def end_epoch(self) -> float:
        """The epoch's mean training loss on this worker; the next epoch begins."""
        loss = float(self.loss_sum) / self.steps_per_epoch
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum.zero_()
        return loss

    @torch.no_grad()
    def validate(self, data: Tensor, labels: Tensor) -> float:
        """Mean loss of the averaged weights on held-out rows, with the same noise every time."""
        model = self.averaged
        was = model.training
        model.eval()
        self.generator.manual_seed(mix(0, 0, -2, 0))
        total = 0.0
        for start in range(0, len(data), VAL_BATCH):
            part = data[start : start + VAL_BATCH].to(self.device)
            loss = self.task.loss(model, part, labels[start : start + VAL_BATCH].to(self.device), self.generator)
            total += float(loss) * len(part)
        model.train(was)
        return total / len(data)

    def state(self) -> dict[str, Any]:
        """What only resuming needs."""
        return {
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "ema_updates": self.ema.updates if self.ema else 0,
            "epoch": self.epoch,
            "step": self.step,
            "loss_sum": float(self.loss_sum),
        }

    def load(self, content: dict[str, Any]) -> None:
        """Goes on from a checkpoint's ``model``, ``ema`` and ``training``."""
        state = content["training"]
        inner = getattr(self.task.model, "autoencoder", self.task.model)
        inner.load_state_dict(content["model"])
        if self.ema:
            self.ema.model.load_state_dict(content["ema"])
            self.ema.updates = state["ema_updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.loss_sum.fill_(state["loss_sum"])


def lr_factor(schedule: str, step: int, total: int) -> float:
    """Share of the learning rate at a step 1…total: 1, or up from 0 and down a half cosine to 0
    (Loshchilov and Hutter, arXiv:1608.03983, eq. 5 without restarts)."""
    if schedule == "constant":
        return 1.0
    warm = max(WARM_UP * total, min(WARM_UP_STEPS, total / 2))
    if step < warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1.0, total - warm))))


def mix(seed: int, epoch: int, step: int, rank: int) -> int:
    """One 63-bit seed from four numbers (splitmix64's finaliser, Steele et al. 2014, over each in turn)."""
    state = 0
    for value in (seed, epoch, step, rank):
        state = (state + value + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state % 2**63


def resident(data: Tensor, device: torch.device) -> Tensor:
    """The data on its device once, where it fits; otherwise it stays here and is sent batch by batch (``picked``)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if data.numel() * data.element_size() > RESIDENT_SHARE * free:
            return data
    return data.to(device)
