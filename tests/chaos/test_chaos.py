"""Twenty jobs on a real pool while runners, workers, the server, clients and PostgreSQL are killed and stopped."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from soak import check, soak, started_pool

if TYPE_CHECKING:
    from pathlib import Path

SEED = int(os.environ.get("MODELOPS_CHAOS_SEED", "20261126"))


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("no_process_left")
def test_twenty_jobs_under_fire_end_as_if_nothing_had_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with started_pool(tmp_path) as pool:
        ended, calm, killer = soak(pool, 20, SEED, every_s=1.5, long=True)
        wrong = check(ended, calm, killer, least_hits=3)
    with capsys.disabled():
        hits = sum(len(strike.jobs) for strike in killer.strikes)
        print(f"\nseed {SEED}: {len(killer.strikes)} strikes, {hits} hits of live work in {len(ended)} jobs")  # noqa: T201
    assert not wrong, "\n".join([*wrong, *map(str, killer.strikes)])
    assert len(ended) == 20
