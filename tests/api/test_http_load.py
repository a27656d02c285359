"""Many clients at once on SQLite: no lock error, no lost submission, prompt answers."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from http_service import Client, request_for, run_some

from modelops.states import JobEvent, ReplicateStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelops.server.service import JobService

N_CLIENTS = 64
ROUNDS = 5


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
        thread.join(240)
    assert not any(thread.is_alive() for thread in threads)
    return wrong


def test_64_clients_submit_watch_and_cancel_at_once(client: Client, service: JobService, bundle: str) -> None:
    submitted: list[str] = []
    statuses: Counter[int] = Counter()

    def do(i: int) -> None:
        for round_ in range(ROUNDS):
            job = client.submit(request_for(bundle), key=f"{i}-{round_}")
            submitted.append(job["job"])
            repeated = client.submit(request_for(bundle), key=f"{i}-{round_}")
            assert repeated["job"] == job["job"]
            answers: list[Any] = [
                client("GET", f"/v1/jobs/{job['job']}"),
                client("GET", f"/v1/jobs/{job['job']}/events"),
                client("POST", f"/v1/jobs/{job['job']}/cancel"),
                client("GET", f"/v1/jobs/{job['job']}?wait_s=0.2&tag={job['tag']}"),
                client("GET", "/v1/jobs?limit=10"),
            ]
            statuses.update(answer.status for answer in answers)
            assert answers[3].json()["cancel_asked"]

    assert all_at_once(N_CLIENTS, do) == []
    assert statuses == {200: N_CLIENTS * ROUNDS * 5}
    assert len(submitted) == len(set(submitted)) == N_CLIENTS * ROUNDS
    stored = {view.job for view in service.jobs(limit=10_000)}
    assert stored == set(submitted)
    for job in submitted[:: ROUNDS * 8]:
        assert [event.kind for event in service.events(job)] == ["created", "cancel_wanted"]
        assert service.parameter_set(job, 2).canonical == b'{"x":2}'


def test_a_job_with_5000_failures_is_watched_by_ten_clients(
    client: Client, service: JobService, bundle: str
) -> None:
    n = 5_000
    job = client.submit(request_for(bundle, n_params=5, n_replicates=1_000))["job"]
    failed = dict.fromkeys(range(n), ReplicateStatus.FAILED)
    done = threading.Event()

    def watch(i: int) -> None:
        tag, n_failed = "", 0
        while n_failed < n:
            status = client.get(f"/v1/jobs/{job}?wait_s=30&tag={tag}")
            assert sum(status["counts"].values()) == n
            tag, n_failed = status["tag"], status["counts"].get("failed", 0)
        done.wait(240)
        table = pa.ipc.open_stream(client("GET", f"/v1/jobs/{job}/tables/failures").data).read_all()
        assert table["error_type"].to_pylist() == ["ValueError"] * n
        assert client.get(f"/v1/jobs/{job}")["state"] == "failed"

    def run() -> None:
        try:
            run_some(service, job, failed, chunk=20, end=JobEvent.NONE_SUCCEEDED)
        finally:
            done.set()

    driver = threading.Thread(target=run)
    driver.start()
    assert all_at_once(10, watch) == []
    driver.join(240)
