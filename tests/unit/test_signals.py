"""What asks a command to stop: one wish, however often it is sent, and to whom."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_ray.distributed.local import deaf
from ldm_ray.terminal.signals import STOPPING, on_first
from tests.helpers.data import ROOT


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_that_is_sent_twice_is_one_wish(number: signal.Signals) -> None:
    """As by ``timeout``, which sends it to the command and to its process group."""
    before, asked = signal.getsignal(number), list[int]()
    with on_first(asked.append):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
    assert asked == [number]
    assert signal.getsignal(number) is before


SECOND_INTERRUPT = """
import os, signal, time
from ldm_ray.terminal import signals
signals.AGAIN_S = 0.0
with signals.on_first(print):
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        time.sleep(0.01)
        os.kill(os.getpid(), number)
    print("not reached")
"""


def test_an_interrupt_that_comes_later_ends_at_once() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, "-c", SECOND_INTERRUPT], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, f"{int(signal.SIGTERM)}\n", "")


def test_processes_started_deaf_stay_when_everybody_is_told_to_stop(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    with deaf():  # a shell, and what it starts in turn
        process = subprocess.Popen(["sh", "-c", f"sleep 60 & echo $! > {ready}; wait"], start_new_session=True)
    try:
        while not ready.exists() or not ready.read_text().strip():
            assert process.poll() is None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.killpg(process.pid, number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        os.kill(int(ready.read_text()), 0)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
