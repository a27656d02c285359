"""What takes long is told while it does, and what does not is not."""

from __future__ import annotations

import threading

from modelops.worker.slow import said_if_slow


def test_what_is_slow_is_told_while_it_lasts() -> None:
    told = threading.Event()
    with said_if_slow(told.set, after_s=0.01):
        assert told.wait(60)


def test_what_is_quick_is_not_told() -> None:
    told = threading.Event()
    with said_if_slow(told.set, after_s=3600.0):
        pass
    assert not told.is_set()
    assert not [
        t for t in threading.enumerate() if isinstance(t, threading.Timer) and not t.finished.is_set()
    ]
