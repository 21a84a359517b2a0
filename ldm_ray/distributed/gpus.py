"""The part of the cluster's GPUs that each worker takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from ldm_ray.devices import cuda
from ldm_ray.distributed.cluster import resources, use_gpu
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.gpu_share import check_share, fitting

KIND = "accelerator_type:"  # with its name, the resource of nodes that have a type of accelerator
SOME = 0.001  # of it


@dataclass(frozen=True)
class Share:
    """gpus: of one worker, 0 on a CPU. kind: the type of accelerator they must be, or None for any."""

    gpus: float = 0
    kind: str | None = None

    def __bool__(self) -> bool:
        return self.gpus > 0

    def options(self) -> dict[str, Any]:
        """Of ``ray.remote`` and of Ray Data's ``map_batches``: a CPU core where there is no GPU."""
        if not self:
            return {"num_gpus": 0, "num_cpus": 1}
        return {"num_gpus": self.gpus} | ({"accelerator_type": self.kind} if self.kind else {})

    def bundle(self) -> dict[str, float]:
        """The same GPUs in the words of Ray Tune."""
        return {"gpu": self.gpus} | ({KIND + self.kind: SOME} if self and self.kind else {})

    def room(self) -> int:
        """How many such workers fit at once: on the GPUs, with those that an autoscaler can add, or one per core."""
        if not self:
            return resources()[0]
        here = [int(node["Resources"]["GPU"]) for node in nodes(self.kind)]
        return sum(fitting(count, self.gpus) for count in [*here, to_come()])


CPU = Share()


def share_of(config: Any) -> Share:
    """What a worker of a command takes, by its ``device``, ``gpus_per_worker`` and ``accelerator_type``."""
    return shared_out(config.device, config.gpus_per_worker, config.accelerator_type, "--gpus-per-worker")


def shared_out(device: str | None, gpus: float | None, kind: str | None, flag: str, default: float = 1) -> Share:
    """What a worker takes: ``gpus``, else the default, where the cluster has GPUs and the CPU is not asked for.

    flag: what gives ``gpus``. Raises ConfigError where the device, so many GPUs or their type are not there.
    """
    if gpus is not None:
        check_share(flag, gpus)
    kind_flag = "--accelerator-type" if flag.startswith("--") else "accelerator_type"
    if not use_gpu(device):
        if gpus or kind:
            asked = f"{flag} {gpus:g}" if gpus else f"{kind_flag} {kind}"
            why = f"on the device {device} there is" if device in ("cpu", "mps") else "the Ray cluster has"
            raise ConfigError(f"{asked}: {why} no GPU; leave it out")
        return CPU
    share = Share(default if gpus is None else gpus, kind)
    if kind and not nodes(kind) and not to_come():
        kinds = {name[len(KIND) :] for node in nodes() for name in node["Resources"] if name.startswith(KIND)}
        raise ConfigError(f"{kind_flag} {kind}: the Ray cluster has {', '.join(sorted(kinds)) or 'no type it knows'}")
    if share and not share.room():
        raise ConfigError(f"{flag} {share.gpus:g}: no node of the Ray cluster has so many GPUs; take fewer")
    return share


def nodes(kind: str | None = None) -> list[dict[str, Any]]:
    """The living nodes with GPUs, of one type or of any."""
    living = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    return [node for node in living if kind is None or KIND + kind in node["Resources"]]


def to_come() -> int:
    """GPUs that an autoscaler can add to those of the living nodes, as far as the cluster's file says so."""
    return max(0, resources()[1] - sum(int(node["Resources"]["GPU"]) for node in nodes()))


def check_worker() -> None:
    """Where a worker starts: ConfigError in one line where Ray gave it a GPU that torch cannot use."""
    if ray.is_initialized() and ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        cuda.check_visible()


def check_gpus(share: Share) -> None:
    """ConfigError as one worker's ``check_worker`` says it, before many start and are tried again and again."""
    if share:
        try:
            ray.get(ray.remote(check_worker).options(**share.options()).remote())
        except ConfigError as error:
            raise ConfigError(str(getattr(error, "cause", error))) from None  # without Ray's traceback around it
