"""What is asked of a server whose disks, storage or other clients keep it busy: a status never waits for these."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from http_service import Client, request_for, run_some

from modelops.server.http import api
from modelops.states import ReplicateStatus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelops.server.service import JobService


@pytest.fixture
def go_on() -> Iterator[threading.Event]:
    """Be set when what a test holds up may go on, at the latest when the test has ended."""
    event = threading.Event()
    yield event
    event.set()


def test_a_status_is_answered_while_more_submissions_than_threads_wait_for_the_disk(
    client: Client, service: JobService, bundle: str, go_on: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.submit(request_for(bundle))["job"]
    store, stored = service._store, threading.Semaphore(0)

    def slowly(*given: Any) -> Any:
        stored.release()
        assert go_on.wait(60)
        return store(*given)

    monkeypatch.setattr(service, "_store", slowly)
    with ThreadPoolExecutor(32) as clients:
        submitted = [clients.submit(client.submit, request_for(bundle)) for _ in range(32)]
        try:
            for _ in range(api.SUBMIT_THREADS):
                assert stored.acquire(timeout=60)
            assert client.get("/v1/server")["jobs"] == {"queued": 1}
            assert client.get(f"/v1/jobs/{job}")["state"] == "queued"
        finally:
            go_on.set()
        assert len({one.result()["job"] for one in submitted}) == 32
    assert client.get("/v1/server")["jobs"] == {"queued": 33}


def test_a_storage_that_does_not_answer_is_named_in_time_and_keeps_no_status_waiting(
    client: Client, service: JobService, bundle: str, go_on: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.submit(request_for(bundle))["job"]
    run_some(service, job, {0: ReplicateStatus.SUCCEEDED})
    (name, *_) = [file["name"] for file in client.get(f"/v1/jobs/{job}/files")["files"]]
    monkeypatch.setattr(api, "STORAGE_WITHIN_S", 0.5)

    def silent(_name: str, _offset: int, _length: int) -> bytes:
        assert go_on.wait(60)
        raise AssertionError("nobody waits for it any more")

    monkeypatch.setattr(service.objects, "read", silent)
    with ThreadPoolExecutor(40) as clients:
        answers = [clients.submit(client, "GET", f"/v1/jobs/{job}/files/{name}") for _ in range(40)]
        assert client.get(f"/v1/jobs/{job}")["state"] == "running"
        found = {(one.result().status, one.result().json()["detail"]) for one in answers}
    ((status, said),) = found
    assert status == 503
    assert f"the storage {service.objects.place} has not answered for 0.5 s" in said
