"""Jobs over HTTP: submitted, found, watched, cancelled, read."""

from __future__ import annotations

import pyarrow as pa
from http_service import Client, Drivers, request_for


def test_a_submitted_job_is_found_and_woken(client: Client, bundle: str, drivers: Drivers) -> None:
    answer = client("POST", "/v1/jobs", json=request_for(bundle), headers={"ModelOps-User": "ada@here"})
    job = answer.json()["job"]
    assert (answer.status, answer.headers["Location"]) == (201, f"/v1/jobs/{job}")
    assert drivers.woken == 1
    status = client.get(f"/v1/jobs/{job}")
    assert (status["state"], status["size"], status["counts"]) == ("queued", 12, {"pending": 12})
    assert [page["job"] for page in client.get("/v1/jobs")["jobs"]] == [job]
    (created,) = client.get(f"/v1/jobs/{job}/events")["events"]
    assert (created["who"], created["kind"], created["number"]) == ("ada@here", "created", 1)
    table = pa.ipc.open_stream(client("GET", f"/v1/jobs/{job}/tables/replicates").data).read_all()
    assert table["status"].to_pylist() == ["pending"] * 12
