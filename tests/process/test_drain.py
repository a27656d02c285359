from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from modelops.processes import drain as module
from modelops.processes.drain import Drain, RotatingFile

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_the_first_mark_of_a_request_is_seen_at_once_however_long_the_pauses_have_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHORTEST_PAUSE_S", 3600.0)
    monkeypatch.setattr(module, "LONGEST_PAUSE_S", 3600.0)
    read_end, write_end = os.pipe()
    drain = Drain(read_end, "m", RotatingFile(tmp_path / "log"))
    try:
        for index in (4, 5, 9):  # the last one is written while the drain pauses behind the one before
            if index != 5:
                drain.begin(None)
            os.write(write_end, b"\x1em:%d\n" % index)
            deadline = time.monotonic() + 60
            while drain.opened(index) is None and time.monotonic() < deadline:
                os.sched_yield()
            assert drain.opened(index) is not None
    finally:
        os.close(write_end)
        drain.wait_ended(60)
        drain.close()
