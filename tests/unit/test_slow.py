"""What takes long is told while it does, and what does not is not."""

from __future__ import annotations

import threading

from modelops.worker.slow import said_if_slow


def test_what_is_slow_is_told_while_it_lasts() -> None:
    said: list[str] = []
    told = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        told.set()

    with said_if_slow(say, after_s=0.01):
        assert told.wait(60)
    assert said == [""]


def test_what_is_quick_is_not_told() -> None:
    said: list[str] = []
    with said_if_slow(said.append, after_s=3600.0) as note:
        note("installing")
    assert said == []
    assert not [
        t for t in threading.enumerate() if isinstance(t, threading.Timer) and not t.finished.is_set()
    ]
