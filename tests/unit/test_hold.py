"""One command at a time in a folder, and names that no two runs take."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from ldm_ray.files import hold as module
from ldm_ray.files.hold import Held, Lease, hold, new_folder, time_in
from ldm_ray.files.paths import AnyPath, to_path
from ldm_ray.settings.errors import ConfigError
from tests.helpers.commands import none_left, start, wait_for

HOLDER = "import sys, time\nfrom pathlib import Path\nfrom ldm_ray.files.hold import hold\n"
HOLDER += "with hold(Path(sys.argv[1])):\n    Path(sys.argv[1], 'ready').touch()\n    time.sleep(600)"


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    with none_left():
        yield


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that are renewed often."""
    monkeypatch.setattr(module, "RENEW_S", 0.05)
    monkeypatch.setattr(module, "LAPSE_S", 1.0)


def test_another_process_is_named_and_its_death_frees_the_folder(tmp_path: Path) -> None:
    process = start("-c", HOLDER, tmp_path)
    wait_for((tmp_path / "ready").exists, process)
    who = f"process {process.pid} on {socket.gethostname()} .*UTC"
    with pytest.raises(Held, match=rf"{tmp_path} is in use by {who}"), hold(tmp_path):
        pass
    process.kill()
    process.wait()
    with hold(tmp_path):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["ready"]


def test_a_folder_that_stayed_empty_is_not_left_behind(tmp_path: Path) -> None:
    with hold(tmp_path / "deep" / "new"):
        assert (tmp_path / "deep" / "new").is_dir()
    assert not (tmp_path / "deep" / "new").exists()
    with hold(tmp_path / "deep" / "new"):
        (tmp_path / "deep" / "new" / "file").touch()
    assert (tmp_path / "deep" / "new" / "file").exists()


def test_where_nothing_can_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written: "), hold(tmp_path / "file" / "x"):
        pass


def holders(folder: AnyPath, count: int, lease: bool) -> list[bool]:
    """Whether each of so many that come at once gets the folder; whoever does keeps it until all have tried."""
    together = Barrier(count)

    def come(_: int) -> bool:
        together.wait()
        with contextlib.ExitStack() as stack:
            try:
                if lease:
                    stack.callback(Lease(folder).end)
                else:
                    stack.enter_context(hold(folder))
            except Held:
                together.wait()
                return False
            together.wait()
        return True

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(come, range(count)))


@pytest.mark.parametrize("lease", [False, True])
def test_one_of_many_gets_the_folder(lease: bool, quick: None, tmp_path: Path) -> None:
    assert holders(tmp_path / "x", 5, lease).count(True) == 1
    assert holders(tmp_path / "x", 1, lease) == [True]


def test_a_store_and_a_disk_without_locks_have_leases(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    for folder in (tmp_path / "disk", to_path((tmp_path / "store").as_uri())):
        with hold(folder), pytest.raises(Held, match=f"is in use by process {os.getpid()}"), hold(folder):
            pass
        assert not list((tmp_path / folder.name).glob(".held-*"))
        with hold(folder):
            pass


def test_a_lease_that_is_not_renewed_lapses(quick: None, tmp_path: Path) -> None:
    (tmp_path / ".held-dead").write_text("7\nsomebody")
    Lease(tmp_path).end()
    assert list(tmp_path.iterdir()) == []


# --- names ---


def test_folders_begun_together_have_different_names(tmp_path: Path) -> None:
    count = 8
    together = Barrier(count)

    def begin(_: int) -> str:
        with contextlib.ExitStack() as held:
            together.wait()
            folder = new_folder(tmp_path / "runs", "run", held)
            (folder / "latest.pt").touch()
            together.wait()
            return folder.name

    with ThreadPoolExecutor(count) as pool:
        names = list(pool.map(begin, range(count)))
    assert len(set(names)) == count and {folder.name for folder in (tmp_path / "runs").iterdir()} == set(names)


def test_runs_begun_together_in_a_store_have_different_names(quick: None, tmp_path: Path) -> None:
    store = to_path(tmp_path.as_uri()) / "runs"
    with contextlib.ExitStack() as held:
        names = {new_folder(store, "run", held).name for _ in range(3)}
    assert len(names) == 3


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/Los_Angeles"])
def test_names_are_utc(zone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        before = int(time.time())
        with contextlib.ExitStack() as held:
            begun = time_in(new_folder(tmp_path, "run", held).name)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert begun is not None and before <= begun <= time.time()


def test_a_new_name_sorts_after_the_others_though_the_clock_was_set_back(tmp_path: Path) -> None:
    ahead = time.strftime("other-%Y%m%d-%H%M%S", time.gmtime(time.time() + 9 * 3600))
    for name in (ahead, "other-20010101-000000", "other-99999999-999999", "no-time"):
        (tmp_path / name).mkdir()
    with contextlib.ExitStack() as held:
        begun = time_in(new_folder(tmp_path, "run", held).name)
    assert begun == (time_in(ahead) or 0) + 1
