"""Ctrl-C while a line is being written: that it was understood is told, and nothing breaks."""

from __future__ import annotations

import io
import os
import signal
import threading
from typing import Any

import pytest
from rich.console import Console

from modelops.client.progress import ProgressBar
from modelops.client.run import Interrupts
from modelops.client.watch import Cancels


class Interrupted(io.RawIOBase):
    """A terminal at which somebody presses Ctrl-C during each of the first writes to it."""

    def __init__(self, presses: int) -> None:
        self.written, self._presses = b"", presses

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self.written += bytes(data)
        if self._presses and threading.current_thread() is threading.main_thread():
            self._presses -= 1
            os.kill(os.getpid(), signal.SIGINT)
        return len(data)


class Asked:
    """A driver, or a job, that is asked to end."""

    def __init__(self) -> None:
        self.n = 0

    def cancel(self, _who: str = "", *, at_once: bool = False) -> None:
        self.n += 1


@pytest.mark.parametrize("kind", [Interrupts, Cancels])
def test_ctrl_c_in_the_middle_of_a_line_is_told_and_heeded(kind: type[Any]) -> None:
    terminal, asked = Interrupted(presses=2), Asked()
    lines = io.TextIOWrapper(io.BufferedWriter(terminal, buffer_size=1), write_through=True)
    bar = ProgressBar(Console(file=lines), plain=True)
    with kind(bar) as pressed:
        pressed.drive(asked) if kind is Interrupts else pressed.of(asked)
        bar.stage("one")
        bar.stage("two")
    assert asked.n == 2
    said = terminal.written.decode()
    assert all(line in said for line in ("one", "two", "stopping: finished", "stopping at once"))
