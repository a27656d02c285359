"""Jobs of a server, by nothing but its HTTP API. Values are decoded here, exactly as they were stored."""

from __future__ import annotations

import re
import threading
import time
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn

import msgspec

from modelops.client.reported import reported_values
from modelops.client.status import (
    UNKNOWN,
    JobEventRecord,
    JobFile,
    JobFiles,
    JobStatus,
    PoolStatus,
    Reported,
    in_order,
)
from modelops.errors import InternalError, NotFoundError, RequestError, ServerUnreachableError
from modelops.states import JobState
from modelops.study.ids import BundleDigest, JobId, ParamId
from modelops.study.spec import recorded_spec
from modelops.who import whoami

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import pyarrow as pa

    from modelops.client.http import Http
    from modelops.home import Home
    from modelops.store.parameters import ParameterSet
    from modelops.study.spec import JobSpec

_ORDINAL_OR_ID: Final = re.compile(r"[0-9]{1,16}|[0-9a-f]{32}")
STATUS_PATIENCE_S: Final = 2.0
STATUS_READ_S: Final = 5.0
PAGE: Final = 500
MAX_WAIT_S: Final = 60
SHORT_WAIT_S: Final = 0.2
DIGESTS_PAUSE_S: Final = 0.1


def who_asks() -> dict[str, str]:
    """Return the header that says who asks, for the job's story."""
    return {"ModelOps-User": whoami().encode("ascii", "replace").decode()}


class Progress(msgspec.Struct, frozen=True):
    """What a running replicate reports. ``values``: tagged, see `modelops.client.reported`."""

    param: int
    replicate: int
    fraction: float | None = None
    values: dict[str, Any] = {}


class Pool(msgspec.Struct, frozen=True):
    """A pool of workers as a job sees it."""

    name: str
    asked: bool = False
    workers: int = 0
    slots: int = 0
    counts: dict[str, int] = {}
    waiting_since: datetime | None = None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """``GET /v1/jobs/{job}``; fields as in docs/reference/http-api.md."""

    job: str
    name: str = ""
    bundle: str = ""
    bundle_name: str = ""
    state: str
    reason: str = ""
    run: int = 1
    created_at: datetime | None = None
    changed_at: datetime | None = None
    n_params: int = 0
    n_replicates: int = 0
    size: int = 0
    counts: dict[str, int] = {}
    aggregates: dict[str, int] = {}
    eta: float | None = None
    stalled: str = ""
    waiting_for: str = ""
    doing: str = ""
    driven: bool = False
    n_workers: int = 0
    progress: tuple[Progress, ...] = ()
    pools: tuple[Pool, ...] = ()
    unreadable: str = ""
    tag: str | int | None = None

    def status(self) -> JobStatus:
        """Return it as a modeler sees it."""
        return JobStatus(
            state=UNKNOWN if self.state == UNKNOWN else _job_state(self.state),
            counts=in_order(self.counts),
            aggregates=in_order(self.aggregates),
            reason="; ".join(filter(None, (self.reason, self.unreadable))),
            eta=self.eta,
            progress=tuple(
                Reported(p.param, p.replicate, p.fraction, reported_values(p.values)) for p in self.progress
            ),
            stalled=self.stalled,
            waiting_for=self.waiting_for,
            doing=self.doing,
            pools=tuple(
                PoolStatus(p.name, p.asked, p.workers, p.slots, in_order(p.counts), p.waiting_since)
                for p in self.pools
            ),
        )


def _job_state(text: str) -> JobState:
    try:
        return JobState(text)
    except ValueError:
        raise InternalError(
            f"the server says {text!r} of a job, which this version does not know; upgrade modelops here"
        ) from None


class JobsPage(msgspec.Struct, frozen=True):
    """``GET /v1/jobs``."""

    jobs: tuple[Summary, ...]
    next: str | None = None


class _Event(msgspec.Struct, frozen=True):
    number: int
    at: datetime
    who: str
    kind: str
    text: str


class _Events(msgspec.Struct, frozen=True):
    events: tuple[_Event, ...]
    next: int | str | None = None


class _Parameters(msgspec.Struct, frozen=True):
    param: int
    param_id: str
    canonical: str


class _Outputs(msgspec.Struct, frozen=True):
    returned_dict: bool
    outputs: tuple[tuple[str, str, bytes], ...]


class _File(msgspec.Struct, frozen=True):
    name: str
    n_bytes: int
    sha256: str


class _Files(msgspec.Struct, frozen=True):
    files: tuple[_File, ...]
    final: bool
    next: str | None = None


class HttpSource:
    """The jobs of one server. Safe to use from many threads.

    Parameters
    ----------
    home
        Where this machine keeps snapshots, environments and what was fetched.
    """

    def __init__(self, http: Http, home: Home) -> None:
        self.http, self.home = http, home
        self._lock = threading.Lock()
        self._known: dict[JobId, tuple[datetime, JobStatus, str | int | None]] = {}

    # How it goes

    def summary(self, job: JobId) -> Summary:
        """Return what the server says of a job. Unlike `status` it raises when there is no answer."""
        return self.http.get(f"/jobs/{job}").as_type(Summary)

    def status(self, job: JobId) -> JobStatus:
        """Return the status, or ``unknown`` when the server does not answer."""
        return self._look(job, (), STATUS_READ_S)

    def wait_for_change(self, job: JobId, since: JobStatus | None, wait_s: float) -> JobStatus:
        """Let the server answer when something has changed."""
        with self._lock:
            known = self._known.get(job)
        if since is None or known is None or known[1] != since or since.unknown_since is not None:
            return self.status(job)
        if wait_s < 1:  # the server waits for whole seconds
            time.sleep(min(max(wait_s, 0.0), SHORT_WAIT_S))
            return self.status(job)
        asked_s = min(int(wait_s), MAX_WAIT_S)
        return self._look(job, (("wait_s", asked_s), ("tag", known[2])), asked_s + STATUS_READ_S)

    def wait_for_end(self, job: JobId, wait_s: float) -> JobStatus:
        """Let the server answer when the job has ended; what happens before costs neither of us anything."""
        asked_s = max(0.0, min(wait_s, MAX_WAIT_S))
        return self._look(job, (("wait_s", f"{asked_s:.3f}"), ("ended", "true")), asked_s + STATUS_READ_S)

    def _look(
        self, job: JobId, query: Sequence[tuple[str, str | int | float | None]], read_s: float
    ) -> JobStatus:
        try:
            answer = self.http.get(f"/jobs/{job}", query, read_s=read_s, patience_s=STATUS_PATIENCE_S)
        except ServerUnreachableError as e:
            return self._unknown(job, e)
        summary = answer.as_type(Summary)
        status = summary.status()
        with self._lock:
            self._known[job] = (datetime.now(UTC), status, summary.tag)
        return status

    def _unknown(self, job: JobId, error: ServerUnreachableError) -> JobStatus:
        with self._lock:
            at, last, tag = self._known.get(job) or (datetime.now(UTC), None, None)
            if last is None:  # since this moment: never known here
                last = JobStatus(UNKNOWN, {}, {}, "", unknown_since=at)
                self._known[job] = (at, last, tag)
        before = last.last_known if last.state == UNKNOWN else last.state
        known = f"last known: {before}" if before else "nothing was known before"
        if last.counts:
            known += "".join(f", {n:,} {status}" for status, n in last.counts.items())
        return JobStatus(
            state=UNKNOWN, counts=last.counts, aggregates=last.aggregates, unknown_since=at, last_known=before,
            reason=f"unknown since {at.astimezone():%Y-%m-%d %H:%M:%S} ({known}): {error}",
        )  # fmt: skip

    def events(self, job: JobId, after: int = 0) -> list[JobEventRecord]:
        """Return the job's story, page by page."""
        found: list[JobEventRecord] = []
        while True:
            query = (("after", after), ("limit", PAGE))
            page = self.http.get(f"/jobs/{job}/events", query).as_type(_Events).events
            found += [JobEventRecord(e.at, e.who, e.kind, e.text, e.number) for e in page]
            if len(page) < PAGE:
                return found
            after = page[-1].number

    # What to do with it

    def cancel(self, job: JobId, *, at_once: bool = False) -> None:
        """Ask for the job's end; asking again the same changes nothing."""
        query = (("at_once", "true" if at_once else None),)
        self.http.request("POST", f"/jobs/{job}/cancel", query, headers=who_asks(), repeatable=True)

    def resume(self, job: JobId, *, failed: bool) -> None:
        """Ask for what is missing."""
        headers = {"Idempotency-Key": uuid.uuid4().hex, **who_asks()}
        body = msgspec.json.encode({"failed": failed})
        self.http.request("POST", f"/jobs/{job}/resume", body=body, headers=headers)

    def extend(
        self, job: JobId, replicates: int | None, parameters: Sequence[bytes], seeds: Sequence[int] | None
    ) -> None:
        """Ask for more."""
        from modelops.client.submission import ask_with_parameters

        asked: dict[str, Any] = {}
        if replicates is not None:
            asked["replicates"] = replicates
        if seeds is not None:
            asked["seeds"] = list(seeds)
        ask_with_parameters(self, f"/jobs/{job}/extend", asked, parameters)

    def reconcile(self, job: JobId | None) -> dict[str, Any]:
        """Let the server compare what is recorded, stored and running, of one job or of all; return its report."""
        path = "/reconcile" if job is None else f"/jobs/{job}/reconcile"
        return self.http.request("POST", path, headers=who_asks(), read_s=300.0, repeatable=True).as_type(
            dict
        )

    # What it is

    def spec(self, job: JobId) -> JobSpec:
        """Return the job's spec; extended, it is another one."""
        return recorded_spec(self.http.get(f"/jobs/{job}/spec").body, job)

    def parameter_set(self, job: JobId, param: int | str) -> ParameterSet:
        """Return one parameter set."""
        from modelops.store.parameters import ParameterSet

        found = self.http.get(f"/jobs/{job}/parameters/{_place(job, param)}").as_type(_Parameters)
        return ParameterSet(found.param, ParamId(found.param_id), found.canonical.encode())

    def lock(self, job: JobId) -> str:
        """Return the lock of the job's environment."""
        return self.http.get(f"/jobs/{job}/lock").body.decode()

    def snapshot(self, job: JobId) -> Path:
        """Return the bundle on this machine, fetched from the server unless it is here and whole."""
        return self.fetch_bundle(BundleDigest(self.spec(job).bundle))

    def fetch_bundle(self, digest: BundleDigest) -> Path:
        """Return the read-only folder of a bundle that the server has. Raises NotFoundError."""
        from modelops.store.fetch import unpacked

        return unpacked(lambda: self.http.stream(f"/bundles/{digest}"), digest, self.home.cache / "bundles")

    # What it gave

    def table(self, job: JobId, name: str) -> pa.Table:
        """Return a table of the job."""
        import pyarrow as pa

        self.http.get(f"/jobs/{job}")  # a table may take minutes to make; a server that is silent shall not
        answer = self.http.get(f"/jobs/{job}/tables/{name}", read_s=300.0)
        try:
            return pa.ipc.open_stream(pa.py_buffer(answer.body)).read_all()
        except pa.ArrowInvalid as e:
            raise InternalError(f"the server's table {name} of job {job} cannot be read: {e}") from e

    def output(self, job: JobId, param: int | str, replicate: int, name: str | None) -> Any:
        """Return what the model returned."""
        query = (("param", _place(job, param)), ("replicate", _number(job, replicate)), ("name", name))
        outputs = self._outputs(f"/jobs/{job}/output", query)
        value = _decoded(outputs, always_dict=name is not None)
        return value if name is None else value[name]

    def aggregate(self, job: JobId, param: int | str, target: str) -> Any:
        """Return what the aggregate returned."""
        return _decoded(
            self._outputs(f"/jobs/{job}/aggregate", (("param", _place(job, param)), ("target", target)))
        )

    def _outputs(self, path: str, query: Sequence[tuple[str, str | int | float | None]]) -> _Outputs:
        try:
            return msgspec.msgpack.decode(self.http.get(path, query, read_s=300.0).body, type=_Outputs)
        except msgspec.DecodeError as e:
            raise InternalError(f"the server's answer to {path} cannot be understood: {e}") from e

    def log(self, job: JobId, param: int | str | None, replicate: int | None) -> str:
        """Return what the bundle printed."""
        query = (
            ("param", None if param is None else _place(job, param)),
            ("replicate", None if replicate is None else _number(job, replicate)),
        )
        return self.http.get(f"/jobs/{job}/log", query, read_s=300.0).body.decode(errors="replace")

    def files(self, job: JobId) -> JobFiles:
        """List the job's files."""
        listed: list[JobFile] = []
        cursor: str | None = None
        while True:
            page = self.http.get(f"/jobs/{job}/files", (("cursor", cursor),)).as_type(_Files)
            listed += [JobFile(f.name, f.n_bytes, f.sha256) for f in page.files]
            if page.next is None:
                return JobFiles(tuple(listed), page.final)
            if not page.files:
                time.sleep(DIGESTS_PAUSE_S)  # the server is still computing digests
            cursor = page.next

    def pieces(self, job: JobId, file: JobFile, offset: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file; an interrupted transfer goes on where it was."""
        return self.http.stream(f"/jobs/{job}/files/{file.name}", offset)

    def result_paths(self, job: JobId) -> dict[str, Path]:
        """Bring the result files to this machine's cache, verified, and return their paths."""
        from modelops.client.sync import sync_files

        folder = self.home.cache / "results" / job
        synced = sync_files(self, job, folder, only="results/")
        return {name: folder / name for name in sorted((*synced.copied, *synced.unchanged))}


def _place(job: JobId, param: int | str) -> str:
    """Return what names a parameter set in a request. Raises NotFoundError for what can name none."""
    text = str(param)
    if not _ORDINAL_OR_ID.fullmatch(text):
        raise NotFoundError(
            f"job {job} has no parameter set {text}: it is named by a number from 0, or its param_id"
        )
    return text


def _number(job: JobId, replicate: int) -> int:
    if replicate < 0:
        raise NotFoundError(f"job {job} has no replicate {replicate}: they are numbered from 0")
    return replicate


def _decoded(stored: _Outputs, *, always_dict: bool = False) -> Any:
    from modelops_runner.values import decode

    values = {name: decode(kind, data) for name, kind, data in stored.outputs}
    return values if stored.returned_dict or always_dict else values["value"]


def ambiguous(text: str, found: Sequence[str]) -> NoReturn:
    """Refuse a shortened id that several jobs have."""
    shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
    raise RequestError(f"{text!r} fits {len(found)} jobs: {shown}; write more of the id")
