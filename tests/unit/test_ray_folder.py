"""What commands that were killed have left of their Ray, and what of Ray is not theirs."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from ldm_ray.distributed.local import MARK, clean


def session(folder: Path, name: str, marked: bool = False) -> Path:
    """The folder of a start of Ray; marked: by a command that has ended."""
    path = folder / f"session_{name}"
    (path / "logs").mkdir(parents=True)
    (path / "logs" / "raylet.out").write_text("a line\n")
    if marked:
        (path / MARK).touch()
    return path


def test_only_sessions_of_dead_commands_go(tmp_path: Path) -> None:
    dead, alive, foreign = (
        session(tmp_path, "1", marked=True),
        session(tmp_path, "2", marked=True),
        session(tmp_path, "3"),
    )
    (tmp_path / "session_latest").symlink_to(foreign)
    with (alive / MARK).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        clean(tmp_path)
        assert not dead.exists() and (alive / "logs" / "raylet.out").exists() and (foreign / "logs").exists()
    clean(tmp_path)  # its command has ended since
    assert not alive.exists() and foreign.exists()


def test_what_belongs_to_another_user_stays(tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("needs to be root to make a file of another user")
    other = session(tmp_path, "1", marked=True)
    os.chown(other / MARK, 12345, -1)
    clean(tmp_path)
    assert (other / "logs").exists()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="processes are found by /proc")
def test_processes_of_a_dead_command_are_ended_and_no_others(tmp_path: Path) -> None:
    dead, foreign = session(tmp_path, "1", marked=True), session(tmp_path, "2")

    def process(name: str, folder: Path) -> subprocess.Popen[bytes]:
        with (folder / "logs" / "agent.log").open("wb") as log:
            return subprocess.Popen([name, "60"], executable=shutil.which("sleep"), stdout=log)

    agent, reader, other = process("ray::Agent", dead), process("tail", dead), process("ray::Agent", foreign)
    try:
        clean(tmp_path)
        assert agent.wait(30) == -signal.SIGKILL
        assert reader.poll() is None and other.poll() is None
    finally:
        for each in (agent, reader, other):
            each.kill()
            each.wait()
