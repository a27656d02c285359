"""The routes of the server itself: health, schema, what it is connected to, metrics."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
from starlette.responses import Response

from modelops.errors import ClusterError
from modelops.metrics_text import PROMETHEUS
from modelops.server.http.api import json_response
from modelops.server.http.operations import JSON, Answer, Operation
from modelops.server.metrics import metrics_text
from modelops.store.answers import since_text

if TYPE_CHECKING:
    from modelops.server.http.api import Api
    from modelops.server.http.operations import Call
    from modelops.states import JobState

PROTOCOL: Final = 1


class Health(msgspec.Struct, frozen=True):
    """The server lives."""

    status: Literal["ok"] = "ok"


class Readiness(msgspec.Struct, frozen=True):
    """The server has opened its database and storage, and answers requests."""

    status: Literal["ready"] = "ready"


class WorkerView(msgspec.Struct, frozen=True):
    """A worker. ``slots``: how many replicates it runs at a time. ``pool``, ``labels``: where it says it belongs."""

    address: str
    slots: int
    pool: str
    labels: dict[str, str]


class ServerView(msgspec.Struct, frozen=True, kw_only=True):
    """What the server is and what it is connected to.

    ``refused``: workers that get no work as their versions do not fit, by address, and a table of these.
    ``database``: ``ok``, or what is wrong with it. ``waiting``: what database or storage said, by waiting job.
    """

    version: str
    protocol: int
    started_at: datetime
    workers: list[WorkerView]
    refused: dict[str, str]
    scheduler: Literal["connected", "away"]
    database: str
    jobs: dict[str, int]
    waiting: dict[str, str]


class Requests:
    """How many requests were answered, by method and class of status."""

    def __init__(self) -> None:
        self._n: Counter[tuple[str, str]] = Counter()

    def count(self, method: str, status: int) -> None:
        """Count one answer."""
        known = method if method in ("GET", "HEAD", "PUT", "POST") else "other"  # a client's word is no label
        self._n[known, f"{status // 100}xx"] += 1

    def items(self) -> list[tuple[tuple[str, str], int]]:
        """Return the counts."""
        return sorted(self._n.items())


async def health(_api: Api, _call: Call) -> Response:
    """Say that the server lives."""
    return json_response(Health())


async def ready(_api: Api, _call: Call) -> Response:
    """Say that the server answers requests; before it can, `modelops.server.door` says that it cannot."""
    return json_response(Readiness())


async def schema(api: Api, _call: Call) -> Response:
    """Send the OpenAPI document."""
    return Response(api.schema, media_type=JSON)


async def server(api: Api, _call: Call) -> Response:
    """Say what the server is connected to."""
    try:
        jobs, waiting = await api.quick(_open_jobs, api)
    except ClusterError as error:  # that it is away is what is asked for
        since = api.service.records.database.answers.away_since
        said = str(error) if since is None else f"{error} {since_text(since)}"
        return json_response(_server(api, {}, {}, said))
    return json_response(_server(api, jobs, waiting, "ok"))


async def metrics(api: Api, _call: Call) -> Response:
    """Send the metrics as Prometheus reads them."""
    text = await api.quick(metrics_text, api.service, api.version, api.requests.items())
    return Response(text, media_type=PROMETHEUS)


def _open_jobs(api: Api) -> tuple[dict[JobState, int], dict[str, str]]:
    """Return the jobs by state, and what those wait for that wait for database or storage."""
    service = api.service
    waiting: dict[str, str] = {}
    for job in service.supervisor.driven():  # of thousands of others nobody has anything to say
        live = service.supervisor.view(job)
        if live is not None and live.waiting_for:
            waiting[job] = live.waiting_for
    return service.jobs_by_state(), waiting


def _server(api: Api, jobs: dict[JobState, int], waiting: dict[str, str], database: str) -> ServerView:
    service = api.service
    supervisor = service.supervisor
    return ServerView(
        version=api.version,
        protocol=PROTOCOL,
        started_at=service.started_at,
        workers=[
            WorkerView(address, slots, (of := supervisor.membership(address)).pool, of.labels)
            for address, slots in sorted(supervisor.workers().items())
        ],
        refused=supervisor.refused(),
        scheduler="connected" if supervisor.connected() else "away",
        database=database,
        jobs={str(state): n for state, n in jobs.items()},
        waiting=waiting,
    )


OPERATIONS: Final[tuple[Any, ...]] = (
    Operation(
        "GET", "/health", "health", "Say that the server lives.", health, {200: Answer("It does.", Health)}, open=True
    ),
    Operation(
        "GET", "/ready", "ready", "Say that database and storage were opened, so that requests are answered.", ready,
        {200: Answer("They are.", Readiness)}, problems=(503,), open=True,
    ),
    Operation(
        "GET", "/v1/openapi.json", "schema", "Read this document.", schema,
        {200: Answer("This document.", dict[str, Any])},
    ),
    Operation(
        "GET", "/v1/server", "get_server", "Look at the server and its workers.", server,
        {200: Answer("The server.", ServerView)},
    ),
    Operation(
        "GET", "/metrics", "metrics", "Read the metrics as Prometheus does.", metrics,
        {200: Answer("Prometheus text format.", None, "text/plain")},
    ),
)  # fmt: skip
