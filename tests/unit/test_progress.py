"""Word of what takes time: a line that moves on a terminal, lines from time to time elsewhere."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import pytest

from ldm_ray.terminal import progress
from ldm_ray.terminal.progress import Progress


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_lines_come_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "FIRST_S", 0.02)
    monkeypatch.setattr(progress, "EVERY_S", 0.02)
    with caplog.at_level("INFO"), Progress("baking 8 loaves", 8) as shown:
        shown.advance(2)
        with Progress("inside"):
            until(lambda: len(caplog.messages) >= 2)
        with Progress("another"):
            shown.watch(0, 1, [0, 0])
            until(lambda: "50 %" in caplog.messages[-1])
    assert caplog.messages[0].startswith("baking 8 loaves: 25 %, ") and caplog.messages[0].endswith(" s left")
    assert not any("inside" in line or "another" in line for line in caplog.messages)
    count = len(caplog.messages)
    time.sleep(0.1)
    assert len(caplog.messages) == count


def test_what_is_short_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), Progress("a moment"):
        pass
    assert caplog.messages == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_moves_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    monkeypatch.setenv("COLUMNS", "20")
    with pytest.raises(ValueError, match="burnt"), Progress("baking a very long loaf", 4) as shown:
        until(lambda: "baking" in screen.getvalue())
        shown.advance()
        until(lambda: screen.getvalue().count("baking") > 2)
        raise ValueError("burnt")
    assert "\n" not in screen.getvalue() and screen.getvalue().endswith("\r\033[K")
    assert all(len(text) <= 19 for text in screen.getvalue().split("\r\033[K"))
    with Progress("the next"):  # one that failed does not hide those after it
        until(lambda: "the next: 0 s" in screen.getvalue())
