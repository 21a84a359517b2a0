"""Finding or starting Ray, and what the cluster has."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.data

import ldm_ray
from ldm_ray.devices.device import pick_device
from ldm_ray.distributed import local
from ldm_ray.distributed.answer import check_answer
from ldm_ray.files.paths import AnyPath, to_path, unique
from ldm_ray.settings.errors import ConfigError
from ldm_ray.terminal.signals import on_first

log = logging.getLogger(__name__)
# Train releases each report when its controller polls: every 2 s by default, which would pace short epochs.
POLL_S = "0.1"
MAX_SOCKET = 103 if sys.platform == "darwin" else 107  # bytes of a socket's name


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Joins the cluster of RAY_ADDRESS, or starts Ray on this machine without its dashboard; leaves it at the end.

    A Ray that this process has already is used and stays. A cluster's workers get this package's code, whether it
    is installed there or not. Raises ConfigError when a cluster was named and does not answer or does not take the
    token.
    """
    for name, value in {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": POLL_S,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's C++ prints notes on actor restarts into the progress
    }.items():
        os.environ.setdefault(name, value)
    ray.data.DataContext.get_current().enable_progress_bars = False  # the commands have their own
    with contextlib.ExitStack() as stack:
        if ray.is_initialized():
            gc.collect()  # a Ray Data job that failed here keeps its actors, and their cores, until it is collected
        elif is_local():
            stack.enter_context(started())
        else:
            stack.enter_context(joined(os.environ["RAY_ADDRESS"]))
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield


@contextlib.contextmanager
def started() -> Iterator[None]:
    """Ray on this machine, until the end. ConfigError when it does not start."""
    # What clouds do to nodes is watched by a process that this machine need not run
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    check_temporary()
    log.info("starting Ray on this machine")
    folder = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray")
    with contextlib.ExitStack() as stack:
        stack.enter_context(on_first(stop))
        try:
            with local.deaf(), local.removed_unless_started(folder):
                context = init("local", include_dashboard=False)  # 1 s and 2 s of a core less
                session = stack.enter_context(local.Session(Path(context.address_info["session_dir"])))
                stack.enter_context(on_first(stop))  # Ray has set a handler of its own
        except Exception as error:  # Ray raises a plain one where a start takes more than 30 s
            raise ConfigError(
                f"Ray does not start on this machine: {first_line(error)} (its folder is {folder}; RAY_TMPDIR names "
                "another place)"
            ) from None
        local.clean(session.folder.parent)
        yield


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """The cluster of an address, until the end. ConfigError when none answers there."""
    code = {"py_modules": [str(Path(ldm_ray.__file__).parent)], "excludes": ["__pycache__"]}
    log.info("joining the Ray cluster of RAY_ADDRESS=%s", address)
    with contextlib.ExitStack() as stack:
        stack.enter_context(on_first(stop))
        try:
            with silent_stderr():  # Ray's C++ tells its own part of what is wrong
                check_answer(address)
            init(address, runtime_env=code)
        except Exception as error:
            raise ConfigError(
                f"no Ray cluster answers at RAY_ADDRESS={address}: {first_line(error)}; name one that runs, or unset "
                "RAY_ADDRESS, and Ray is started on this machine"
            ) from None
        stack.callback(ray.shutdown)
        stack.enter_context(on_first(stop))
        yield


def init(address: str, **settings: Any) -> Any:
    """``ray.init`` in silence."""
    try:
        with silent_stderr():  # its C++ announces the log level set above
            return ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **settings)
    except SystemExit as end:
        if end.code == signal.SIGTERM:  # by the handler that it has just set
            stop(signal.SIGTERM)
        raise


def stop(number: int) -> None:
    """Ends the command with the exit code that the signal has."""
    print(f"\n{signal.Signals(number).name}: stopping", file=sys.stderr, flush=True)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_temporary() -> None:
    """ConfigError where Ray's temporary folder is so long that its sockets in there would have no valid names."""
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    socket = f"/ray/session_0000-00-00_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    excess = len(os.fsencode(os.path.abspath(temporary) + socket)) - MAX_SOCKET
    if excess > 0:
        name = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
        raise ConfigError(
            f"{name}={temporary} is {excess} characters too long for the sockets that Ray has in there: "
            "set RAY_TMPDIR to a shorter folder, such as /tmp"
        )


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Sends what native code writes to standard error nowhere; exceptions still tell what failed."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def is_local() -> bool:
    """Whether Ray is that of this machine alone, which ``connected`` started and will end."""
    return (os.environ.get("RAY_ADDRESS") or "local") == "local"


def resources() -> tuple[int, int]:
    """(CPU cores, GPUs) of all living nodes, or of those that an autoscaled cluster can have.

    Ray does not tell the latter: cluster files say it by LDM_RAY_CPUS and LDM_RAY_GPUS.
    """
    total = ray.cluster_resources()
    cores, gpus = (
        max(int(total.get(name, 0)), int(os.environ.get(f"LDM_RAY_{name}S") or 0)) for name in ("CPU", "GPU")
    )
    return max(1, cores), gpus


def cores_of_each(workers: int) -> int:
    """The most CPU cores that each of so many workers can have; a worker is on one node."""
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    for cores in range(sum(nodes) // workers, 1, -1):
        if sum(there // cores for there in nodes) >= workers:
            return cores
    return 1


def use_gpu(device: str | None) -> bool:
    """Whether workers take a GPU each: where the cluster has any, unless the CPU is asked for.

    Raises ConfigError when a device is asked for that is not there.
    """
    gpus = resources()[1]
    if device == "cuda" and not gpus:
        raise ConfigError("--device cuda: the Ray cluster has no GPU; leave --device out or use cpu")
    if device == "mps":
        pick_device("mps")
    return device in (None, "cuda") and gpus > 0


def check_shared(folder: AnyPath) -> None:
    """With several nodes, makes sure that all of them see the folder, or may read the store. ConfigError otherwise."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    mark = folder / f".seen-by-all-nodes-{unique()}"  # of this command alone
    mark.touch()

    @ray.remote(num_cpus=0)
    def sees(path: str) -> bool:
        return to_path(path).exists()

    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        asked = [
            (
                node["NodeManagerHostname"],
                sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                    str(mark)
                ),
            )
            for node in nodes
        ]
        blind = [name for name, answer in asked if not ray.get(answer)]
    finally:
        mark.unlink(missing_ok=True)
    if blind:
        raise ConfigError(f"--outdir {folder} is not seen by {', '.join(blind)}: name a folder that all nodes share")
