"""Twenty jobs on a real pool while runners, workers, the server, clients and PostgreSQL are killed and stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from processes import below, heir_of_all
from soak import WITHIN_S, soak

if TYPE_CHECKING:
    from collections.abc import Iterator

SEED = int(os.environ.get("MODELOPS_CHAOS_SEED", "20261126"))
START_S = 300


@pytest.mark.timeout(WITHIN_S + 600)
@pytest.mark.usefixtures("no_process_left")
def test_twenty_jobs_under_fire_end_as_if_nothing_had_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        wrong = soak(tmp_path, n_jobs=20, seed=SEED)
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Lend a folder below which PostgreSQL may run as another user."""
    with tempfile.TemporaryDirectory(prefix="modelops-cut-off-") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


@pytest.mark.usefixtures("no_process_left")
@pytest.mark.timeout(2 * START_S)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_soak_that_is_cut_off_leaves_no_process_and_no_file(
    temporary: Path, number: signal.Signals
) -> None:
    program = [sys.executable, str(Path(__file__).with_name("soak.py")), "--jobs", "2"]
    environ = {**os.environ, "TMPDIR": str(temporary)}
    with heir_of_all(), subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=environ) as cut_off:
        watch = threading.Timer(START_S, cut_off.kill)
        watch.start()
        assert cut_off.stdout is not None
        assert any("is submitted" in line for line in cut_off.stdout)
        cut_off.send_signal(number)
        assert cut_off.wait() == 1
        watch.cancel()
        assert below(os.getpid()) == set()
    assert list(temporary.glob("modelops-*")) == []
