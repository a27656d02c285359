"""For tests that may run into the end of CI, as a plugin of pytest: how far they got when they were interrupted.

The file that MODELOPS_UNFINISHED names is written only if none had failed by then: a failure is one, finished or not.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ended: set[str] = set()


def pytest_runtest_logfinish(nodeid: str) -> None:
    ended.add(nodeid)


@pytest.hookimpl(tryfirst=True)  # what follows it ends what the tests started, which may take too long
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    where = os.environ.get("MODELOPS_UNFINISHED")
    if where and exitstatus == pytest.ExitCode.INTERRUPTED and not session.testsfailed:
        text = f"time was over after {len(ended)} of {session.testscollected} tests, none of which failed\n"
        Path(where).write_text(text, "utf-8")
