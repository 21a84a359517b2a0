"""Which tests run one after the other when several processes run tests, and in which order."""

from __future__ import annotations

from xdist.scheduler.loadscope import LoadScopeScheduling

# System tests by file, or by the folder that shares a fixture; those that are not named come next, unit tests last.
LONGEST_FIRST = (
    "test_stop_and_resume",
    "test_ray_up",
    "test_search",
    "test_slurm",
    "test_nodes",
    "test_stores_and_nodes",
    "test_train",
    "test_pixels",
    "test_stores",
    "test_generate",
    "test_first_run",
)


def group(nodeid: str) -> str:
    """A file of tests, or the folder below ``tests/system`` that it lies in."""
    file = nodeid.partition("::")[0].removesuffix(".py")
    return "/".join(file.split("/")[:3])


def place(nodeid: str) -> int:
    kind, name = group(nodeid).split("/")[1:]
    if kind == "system" and name in LONGEST_FIRST:
        return LONGEST_FIRST.index(name)
    return len(LONGEST_FIRST) + (kind == "unit")


class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # xdist tells no types
    """Gives each process a whole group at a time."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)
