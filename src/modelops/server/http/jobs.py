"""The routes of jobs: submit, list, look, wait, cancel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from modelops.server.http.api import json_response, who
from modelops.server.http.operations import Answer, Body, Operation, Place, at
from modelops.server.http.problems import NoSuchRouteError
from modelops.server.requests import (
    ExtendRequest,
    ResumeRequest,
    SubmitRequest,
    decode_extension,
    decode_submission,
)
from modelops.server.service import Reconciled
from modelops.server.views import JobView
from modelops.states import FINAL_JOB_STATES, JobState
from modelops.store.rows import EventRow
from modelops.store.tokens import TokenScope
from modelops.study.spec import JobSpec

if TYPE_CHECKING:
    from starlette.responses import Response

    from modelops.server.http.api import Api
    from modelops.server.http.operations import Call

MAX_WAIT_S: Final = 60
MAX_SUBMISSION_BYTES: Final = 16 << 20
JobText = Annotated[str, at(Place.PATH, "Id of a job.", pattern="^[A-Za-z0-9_-]{1,64}$")]
UserText = Annotated[
    str, at(Place.HEADER, "Who asks, for the job's story.", pattern="^[!-~]([ -~]{0,198}[!-~])?$")
]
KeyText = Annotated[
    str,
    at(
        Place.HEADER,
        "Chosen by the client, new for each new request: when the same request comes again with the same key, it is "
        "not carried out a second time, and the answer is about the same job.",
        pattern="^[!-~]{1,200}$",
    ),
]
WaitS = Annotated[
    float,
    at(Place.QUERY, "Wait so many seconds for news, or as long as the server likes.", ge=0, le=MAX_WAIT_S),
]


AtOnce = Annotated[bool, at(Place.QUERY, "Wait for nothing that workers could still hand in.")]


class JobPath(msgspec.Struct, frozen=True, kw_only=True):
    """One job."""

    job: JobText


class Act(msgspec.Struct, frozen=True, kw_only=True):
    """One job, and who asks."""

    job: JobText
    user: UserText = msgspec.field(name="ModelOps-User", default="")


class Cancel(Act, frozen=True, kw_only=True):
    """Whether to wait for what workers could still hand in."""

    at_once: AtOnce = False


class Submit(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks, and the key of the request."""

    user: UserText = msgspec.field(name="ModelOps-User", default="")
    key: KeyText = msgspec.field(name="Idempotency-Key", default="")


class Begin(msgspec.Struct, frozen=True, kw_only=True):
    """A job that is to begin again, who asks, and the key of the request."""

    job: JobText
    user: UserText = msgspec.field(name="ModelOps-User", default="")
    key: KeyText = msgspec.field(name="Idempotency-Key", default="")


class List(msgspec.Struct, frozen=True, kw_only=True):
    """Which jobs."""

    state: Annotated[list[JobState], at(Place.QUERY, "Only jobs in one of these states.")] = []
    match: Annotated[
        str,
        at(
            Place.QUERY,
            "Only jobs whose id begins (with or without `job_`) or ends so.",
            pattern="^[A-Za-z0-9_-]{1,64}$",
        ),
    ] = ""
    limit: Annotated[int, at(Place.QUERY, "How many at most.", ge=1, le=1000)] = 100
    cursor: Annotated[str, at(Place.QUERY, "`next` of the page before.", pattern="^[A-Za-z0-9_-]{1,64}$")] = (
        ""
    )


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """One job, at once, when it has changed, or when it has ended."""

    job: JobText
    wait_s: WaitS = 0.0
    tag: Annotated[
        str, at(Place.QUERY, "Wait until the job's `tag` is another one than this.", max_length=64)
    ] = ""
    ended: Annotated[bool, at(Place.QUERY, "Wait until the job has ended, whatever else changes.")] = False


class ReadEvents(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a job's story."""

    job: JobText
    after: Annotated[int, at(Place.QUERY, "Number of the last event known.", ge=0, le=2**31 - 1)] = 0
    limit: Annotated[int, at(Place.QUERY, "How many at most.", ge=1, le=10_000)] = 1000
    wait_s: WaitS = 0.0


class OneSet(msgspec.Struct, frozen=True, kw_only=True):
    """One parameter set of a job."""

    job: JobText
    param: Annotated[
        str,
        at(Place.PATH, "Ordinal or `param_id` of a parameter set.", pattern="^([0-9]{1,16}|[0-9a-f]{32})$"),
    ]


class JobPage(msgspec.Struct, frozen=True):
    """Jobs, newest first. ``next``: the cursor of the next page, null on the last one."""

    jobs: list[JobView]
    next: str | None


class EventPage(msgspec.Struct, frozen=True):
    """Events in order. ``next``: what to give as ``after`` to read on."""

    events: list[EventRow]
    next: int


class ParameterView(msgspec.Struct, frozen=True):
    """A parameter set. ``canonical``: its canonical JSON, as text."""

    param: int
    param_id: str
    canonical: str


async def submit(api: Api, call: Call) -> Response:
    """Record a new job, or find the one that the same request made."""
    run = api.slow if len(call.body.parameters or ()) > 100 or call.body.parameters_sha256 else api.submit
    row, new = await run(api.service.submit, call.body, call.given.key or None, who(call))
    view = api.service.as_submitted(row) if new else await api.quick(api.service.status, row.job)
    return json_response(view, 201 if new else 200, {"Location": f"/v1/jobs/{row.job}"})


async def list_jobs(api: Api, call: Call) -> Response:
    """Return a page of jobs."""
    given = call.given
    found = await api.quick(
        api.service.jobs, states=given.state, match=given.match, before=given.cursor, limit=given.limit + 1
    )
    page = found[: given.limit]
    return json_response(JobPage(page, page[-1].job if len(found) > len(page) else None))


async def status(api: Api, call: Call) -> Response:
    """Return a job, at once, when its tag is another, or when it has ended."""
    given = call.given
    if given.ended:
        return json_response(await api.waiting.until(given.job, _ended, given.wait_s, for_end=True))
    wait_s = given.wait_s if given.tag else 0.0
    return json_response(await api.waiting.until(given.job, lambda view: view.tag != given.tag, wait_s))


def _ended(view: JobView) -> bool:
    return view.state in FINAL_JOB_STATES


async def events(api: Api, call: Call) -> Response:
    """Return events, at once or when there are some."""
    given = call.given
    if given.wait_s:
        await api.waiting.until(given.job, lambda view: view.n_events > given.after, given.wait_s)
    found = await api.quick(api.service.events, given.job, given.after, given.limit)
    return json_response(EventPage(found, found[-1].number if found else given.after))


async def spec(api: Api, call: Call) -> Response:
    """Return the frozen record of what a job is."""
    return json_response(await api.quick(api.service.spec, call.given.job))


async def parameters(api: Api, call: Call) -> Response:
    """Return one parameter set."""
    found = await api.stored(api.service.parameter_set, call.given.job, param_of(call.given.param))
    return json_response(ParameterView(found.param, found.param_id, found.canonical.decode()))


async def cancel(api: Api, call: Call) -> Response:
    """Ask for the end of a job."""
    given = call.given
    return json_response(await api.quick(api.service.cancel, given.job, who(call), at_once=given.at_once))


async def resume(api: Api, call: Call) -> Response:
    """Let a job run what is missing."""
    given = call.given
    return json_response(
        await api.slow(api.service.resume, given.job, call.body, given.key or None, who(call))
    )


async def extend(api: Api, call: Call) -> Response:
    """Let a job have more."""
    given = call.given
    return json_response(
        await api.slow(api.service.extend, given.job, call.body, given.key or None, who(call))
    )


async def reconcile(api: Api, call: Call) -> Response:
    """Look for what is not as recorded, of one job or of all."""
    return json_response(await api.slow(api.service.reconcile, getattr(call.given, "job", None)))


def param_of(text: str) -> int | str:
    """Return what names a parameter set: its ordinal, or its id, which has 32 digits."""
    if len(text) >= 32:
        return text
    if not text.isascii() or not text.isdigit():  # a pattern's $ lets a newline at the end pass
        raise NoSuchRouteError(f"{text!r} is neither the ordinal nor the id of a parameter set")
    return int(text)


WHERE: Final = {"Location": "Path of the job."}
JOB: Final = {200: Answer("The job as it is now.", JobView)}
OPERATIONS: Final[tuple[Any, ...]] = (
    Operation(
        "POST", "/v1/jobs", "submit", "Submit a job.", submit,
        {
            201: Answer("The new job.", JobView, headers=WHERE),
            200: Answer("The job that the same request made before.", JobView, headers=WHERE),
        },
        Submit,
        Body(SubmitRequest, max_bytes=MAX_SUBMISSION_BYTES, decode=decode_submission),
        problems=(404, 409, 429), scope=TokenScope.SUBMIT,
    ),
    Operation(
        "GET", "/v1/jobs", "list_jobs", "List jobs, newest first.", list_jobs,
        {200: Answer("A page of jobs.", JobPage)}, List,
    ),
    Operation(
        "GET", "/v1/jobs/{job}", "get_job", "Look at a job, or wait until it changes.", status, JOB, Look,
        problems=(404,),
    ),
    Operation(
        "POST", "/v1/jobs/{job}/cancel", "cancel_job",
        "Ask for the end of a job; asking again the same changes nothing.", cancel, JOB, Cancel, problems=(404, 409),
        scope=TokenScope.SUBMIT,
    ),
    Operation(
        "POST", "/v1/jobs/{job}/resume", "resume_job", "Let a job that has ended run what is missing of it.", resume,
        JOB,
        Begin, Body(ResumeRequest, required=False), problems=(404, 409, 429), scope=TokenScope.SUBMIT,
    ),
    Operation(
        "POST", "/v1/jobs/{job}/extend", "extend_job", "Add replicates or parameter sets to a job that has ended.",
        extend,
        JOB, Begin, Body(ExtendRequest, max_bytes=MAX_SUBMISSION_BYTES, decode=decode_extension),
        problems=(404, 409, 429), scope=TokenScope.SUBMIT,
    ),
    Operation(
        "POST", "/v1/jobs/{job}/reconcile", "reconcile_job",
        "Compare a job's records, stored bytes and what runs; repair what is wrong.", reconcile,
        {200: Answer("What was found.", Reconciled)}, JobPath, problems=(404,), scope=TokenScope.SUBMIT,
    ),
    Operation(
        "POST", "/v1/reconcile", "reconcile", "Do so for all jobs.", reconcile,
        {200: Answer("What was found.", Reconciled)}, scope=TokenScope.ADMIN,
    ),
    Operation(
        "GET", "/v1/jobs/{job}/events", "get_events", "Read a job's story, or wait for its next line.", events,
        {200: Answer("Events.", EventPage)}, ReadEvents, problems=(404,),
    ),
    Operation(
        "GET", "/v1/jobs/{job}/spec", "get_spec", "Read what a job is.", spec,
        {200: Answer("The content of its study.json.", JobSpec)}, JobPath, problems=(404,),
    ),
    Operation(
        "GET", "/v1/jobs/{job}/parameters/{param}", "get_parameters", "Read a parameter set.", parameters,
        {200: Answer("The parameter set.", ParameterView)}, OneSet, problems=(404,),
    ),
)  # fmt: skip
