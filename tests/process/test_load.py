"""Many clients at once on a real pool over SQLite: no lock error, no lost submission, the same truth for all."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from tests.process.pools import PoolHome

import modelops as mo
from modelops.client.http import Http
from modelops.client.served import HttpSource
from modelops.client.server import Local
from modelops.errors import ConflictError
from modelops.states import FINAL_JOB_STATES, JobState
from modelops.store import Records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
N_CLIENTS = 64
N_WATCHERS = 10
N_FAILURES = 5_000
MODEL = """
def simulate(params, seed):
    return {"x": seed}

def fails(params, seed):
    raise ValueError("no")
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[PoolHome]:
    root = tmp_path_factory.mktemp("load") / "home"
    root.mkdir()
    (root / "cache").symlink_to(shared_cache)
    started = PoolHome.at(root, MODELOPS_WORKERS="2")
    try:
        started.ensure()
        yield started
    finally:
        started.close()


@contextlib.contextmanager
def connected(pool: PoolHome) -> Iterator[mo.Client]:
    """Connect as a process of its own would."""
    with contextlib.closing(Http(Local(pool.home))) as http:
        yield mo.Client(source=HttpSource(http, pool.home))


def all_at_once(n: int, do: Callable[[int], None]) -> list[BaseException]:
    """Run ``do`` in ``n`` threads that begin together; return what went wrong."""
    wrong: list[BaseException] = []
    together = threading.Barrier(n)

    def run(i: int) -> None:
        together.wait()
        try:
            do(i)
        except BaseException as error:  # noqa: BLE001  it is reported by the test
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def test_64_clients_submit_watch_and_cancel_at_once_and_every_job_ends_as_asked(
    pool: PoolHome, write_bundle: Callable[..., Path]
) -> None:
    bundle, ended = write_bundle(MODEL), dict[str, JobState | str]()

    def do(i: int) -> None:
        with connected(pool) as client:
            job = client.submit(mo.Study(bundle=bundle, parameters=[{"x": i}], replicates=2, seed=i))
            if cancels := i % 2 == 1:
                with contextlib.suppress(ConflictError):  # it was faster
                    job.cancel()
            assert job.id in [found.job for found in client.summaries(limit=N_CLIENTS)]
            status = job.wait()
            ended[str(job.id)] = status.state
            allowed = {JobState.SUCCEEDED, JobState.CANCELLED} if cancels else {JobState.SUCCEEDED}
            assert status.state in allowed, status
            assert sum(status.counts.values()) == 2
            kinds = [event.kind for event in job.events()]
            assert kinds[0] == "created"
            assert kinds.count("created") == 1
            if status.state is JobState.SUCCEEDED:
                assert job.results()["status"].to_pylist() == ["succeeded"] * 2

    assert all_at_once(N_CLIENTS, do) == []
    assert len(ended) == N_CLIENTS
    with contextlib.closing(Records.open(pool.home.database_url)) as records:
        assert {row.job: row.state for row in records.jobs()} == ended
        assert records.mismatches() == {}
    log = (pool.home.logs / "server.log").read_text()
    assert "locked" not in log
    assert '"level": "error"' not in log


def test_a_job_with_5000_instant_failures_is_the_same_for_ten_who_watch_it(
    pool: PoolHome, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(MODEL)
    study = mo.Study(
        bundle=bundle, model="model:fails", parameters=[{"x": i} for i in range(5)], replicates=N_FAILURES // 5,
        fail_fast=False,
    )  # fmt: skip
    with connected(pool) as client:
        job_id = client.submit(study).id

    def watch(_: int) -> None:
        with connected(pool) as client:
            job, seen, n_failed = client.job(str(job_id)), None, 0
            while seen is None or seen.state not in FINAL_JOB_STATES:
                seen = job.source.wait_for_change(job.id, seen, 5)
                assert sum(seen.counts.values()) == N_FAILURES
                assert n_failed <= seen.counts.get("failed", 0), "what was seen is no longer so"
                n_failed = seen.counts.get("failed", 0)
            assert (seen.state, seen.counts) == (JobState.FAILED, {"failed": N_FAILURES})
            (kind,) = job.failure_summary().to_pylist()
            assert (kind["count"], kind["error_type"]) == (N_FAILURES, "ValueError")

    assert all_at_once(N_WATCHERS, watch) == []
    with connected(pool) as client:
        rows = Counter(client.job(str(job_id)).failures()["message"].to_pylist())
    assert rows == {"no": N_FAILURES}
