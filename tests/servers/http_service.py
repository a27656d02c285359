"""A service over SQLite and a folder, drivers that only remember, and the application behind a real uvicorn."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import urllib3
import uvicorn

from modelops.server.http import make_app
from modelops.server.http.connections import Connection
from modelops.server.requests import SubmitRequest
from modelops.states import JobEvent, JobState, ReplicateStatus
from modelops.store import SegmentWriter, StoredError
from modelops.store.contents import JobContents
from modelops.store.results import finalize
from modelops.study.canonical import canonical_json
from modelops.study.ids import JobId, attempt_id
from modelops.study.index_line import IndexLine
from modelops.study.pools import NO_ALIASES, NO_POOL, Aliases, Membership
from modelops.study.ranges import EMPTY, Ranges
from modelops.study.spec import JobSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from modelops.environments import Lock
    from modelops.server.service import JobService
    from modelops.server.views import LivePool

TOKEN = "a-token-that-only-tests-know"
PYPROJECT = """\
[project]
name = "{name}"
version = "1.0"
requires-python = ">=3.11"
dependencies = [{dependencies}]

[tool.modelops]
{table}
"""
MODEL = "def simulate(params, seed):\n    return {'x': seed}\n\ndef summarize(replicates):\n    return {}\n"


@dataclass(frozen=True)
class SeenReplicate:
    """What a running replicate reports."""

    index: int
    fraction: float
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """What a driver would say of its job."""

    running: Ranges = EMPTY
    eta: float | None = None
    progress: Sequence[SeenReplicate] = ()
    waiting_for: str = ""
    stalled: str = ""
    doing: str = ""
    pools: Sequence[LivePool] = ()
    sleeps_until: float | None = None


@dataclass
class Drivers:
    """Drivers that drive nothing: they count how often they were woken, and say what a test lets them say."""

    seen: dict[str, Seen] = field(default_factory=dict)
    woken: int = 0
    pool: dict[str, int] = field(default_factory=lambda: {"tls://10.0.0.1:4000": 2})
    pools: dict[str, Membership] = field(default_factory=dict)
    refused_workers: dict[str, str] = field(default_factory=dict)
    aliases: Aliases = NO_ALIASES
    scheduler: bool = True
    abandoned: list[str] = field(default_factory=list)
    tell: Callable[[JobId, bool], None] = lambda _job, _ended: None

    def wake(self) -> None:
        self.woken += 1

    def listen(self, listener: Callable[[JobId, bool], None]) -> None:
        self.tell = listener

    def beginning(
        self, job: JobId, bundle: str, lock: Lock | None
    ) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def abandon(self, job: str, who: str) -> None:
        self.abandoned.append(job)

    def view(self, job: str) -> Seen | None:
        return self.seen.get(job)

    def goes_on(self, job: str) -> bool:
        return False

    def driven(self) -> list[JobId]:
        return [JobId(job) for job in self.seen]

    def workers(self) -> dict[str, int]:
        return self.pool

    def membership(self, worker: str) -> Membership:
        return self.pools.get(worker, NO_POOL)

    def refused(self) -> dict[str, str]:
        return self.refused_workers

    def connected(self) -> bool:
        return self.scheduler


class Archive(NamedTuple):
    """A packed bundle."""

    digest: str
    data: bytes


def request_for(bundle: str, n_params: int = 3, n_replicates: int = 4, **changes: Any) -> SubmitRequest:
    """Return a submission of a study with the parameter x."""
    spec = JobSpec(
        name="a study", bundle=bundle, bundle_name="mymodel", model="model:simulate",
        aggregates=("model:summarize",), line=IndexLine.of(n_params, n_replicates),
    )  # fmt: skip
    texts = [msgspec.Raw(canonical_json({"x": i})) for i in range(n_params)]
    return SubmitRequest(spec=msgspec.structs.replace(spec, **changes), parameters=texts)


def run_some(
    service: JobService,
    job: str,
    outcomes: Mapping[int, ReplicateStatus],
    *,
    chunk: int = 1_000_000,
    end: JobEvent | None = None,
) -> None:
    """Commit outcomes as a driver would, in segments of ``chunk``; with ``end``, write the results and end the job."""
    records, id_ = service.records, JobId(job)
    epoch = records.take_lease(id_, "a driver")
    if records.job(id_).state is JobState.QUEUED:
        for event in (JobEvent.STARTED, JobEvent.ENVIRONMENT_READY):
            records.change_state(id_, event, who="a driver", epoch=epoch)
    todo = sorted(outcomes.items())
    for n, lo in enumerate(range(0, len(todo), chunk), 1):
        writer = SegmentWriter(service.objects, id_, attempt_id(epoch, n))
        for index, status in todo[lo : lo + chunk]:
            if status is ReplicateStatus.SUCCEEDED:
                big = b"1" * 100_000 if index == 1 else b"1.5"
                writer.add(index, status, True, [("z", "json", b"%d" % index), ("y", "bytes", big)])
            else:
                error = StoredError(
                    "ValueError", f"bad {index}", "Traceback ...", "stderr", "ValueError@model.py:1"
                )
                writer.add(index, status, True, [], error)
        ref = writer.finish()
        assert ref is not None
        assert records.commit_segment(id_, epoch, ref)
    if end is not None:
        records.change_state(id_, JobEvent.SETTLED, who="a driver", epoch=epoch)
        files = finalize(JobContents.of(service.objects, records, id_))
        records.record_results(id_, "a driver", files, epoch=epoch)
        records.change_state(id_, end, who="a driver", epoch=epoch)


class Client:
    """Requests to a served application, each answered within a deadline."""

    def __init__(self, port: int, token: str = TOKEN) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.pool = urllib3.PoolManager(maxsize=80, timeout=urllib3.Timeout(60), retries=False)
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def __call__(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
    ) -> urllib3.BaseHTTPResponse:
        sent = {**self.headers, **(headers or {})}
        if json is not None:
            sent, body = {"Content-Type": "application/json", **sent}, msgspec.json.encode(json)
        return self.pool.request(method, self.url + path, body=body, headers=sent)

    def get(self, path: str) -> Any:
        answer = self("GET", path)
        assert answer.status == 200, answer.data
        return answer.json()

    def submit(self, request: SubmitRequest, key: str = "") -> dict[str, Any]:
        answer = self("POST", "/v1/jobs", json=request, headers={"Idempotency-Key": key} if key else {})
        assert answer.status in (200, 201), answer.data
        found: dict[str, Any] = answer.json()
        return found


@contextlib.contextmanager
def serving(service: JobService, token: str = TOKEN, **options: Any) -> Iterator[Client]:
    """Serve an application on a loopback port until the block ends."""
    app = make_app(service, token=token, **options)
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        http=Connection,
        loop="uvloop",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    # With its protocol named: asyncio turns Nagle's algorithm off only then, and every answer would take 40 ms.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        client = Client(listening.getsockname()[1], token)
        try:
            yield client
        finally:
            client.pool.clear()
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
