"""What a server does for its clients, without HTTP: submit, look, cancel, resume, extend.

Every method may be called from many threads at once. Nothing is kept here that the store does not have: another
server on the same store gives the same answers.
"""

from __future__ import annotations

import contextlib
import logging
from datetime import timedelta
from functools import partial
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING, Final, Protocol, TypeVar

import msgspec

from modelops.bundles.digest import is_digest
from modelops.errors import (
    BundleMissingError,
    ClusterError,
    ConflictError,
    IntegrityError,
    NotFoundError,
    QueueFullError,
    RequestError,
)
from modelops.garbage import give_back_now
from modelops.server.copying import JobFiles
from modelops.server.extend import extend_job, resume_job
from modelops.server.parameters import canonical_forms, pour_uploaded, texts_of_file
from modelops.server.submission import check_count, check_entries, check_extension, check_spec, check_why
from modelops.server.uploads import Uploads
from modelops.server.views import view_of
from modelops.states import FINAL_JOB_STATES, JobState
from modelops.store import overview, submissions
from modelops.store.aggregate_value import stored_aggregate
from modelops.store.contents import JobContents
from modelops.store.job_log import log_texts
from modelops.store.objects import IN_MEMORY_BYTES
from modelops.store.parameters import Parameters, put_parameters, write_parameters
from modelops.store.results import stream_result_file
from modelops.store.rows import ChangedMeanwhileError, Submission, new_row
from modelops.store.segments import job_folder
from modelops.study.ids import JobId, new_job_id
from modelops.study.ranges import EMPTY
from modelops.study.spec import encode_spec, recorded_spec
from modelops.volumes import temporary_files_are

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from modelops.environments import Lock
    from modelops.home import Home
    from modelops.server.requests import ExtendRequest, ResumeRequest, SubmitRequest
    from modelops.server.views import Driving, JobView
    from modelops.store import EventRow, JobRow, Objects, Records
    from modelops.store.parameters import ParameterSet
    from modelops.store.segment_table import StoredOutput
    from modelops.study.spec import JobSpec

log = logging.getLogger(__name__)
MAX_JOBS: Final = 10_000
RECENT: Final = timedelta(minutes=10)
MANY_SETS: Final = 50_000  # whose texts are worth giving back what they took
T = TypeVar("T")


class Found(Protocol):
    """Something that was not as recorded, and was repaired."""

    @property
    def job(self) -> JobId: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def told(self) -> str: ...  # noqa: D102


class _Write(Protocol):
    """Stores the parameters of a job, with further objects of it."""

    def __call__(self, objects: Objects, job: JobId, *, beside: Mapping[str, bytes]) -> object: ...


class Reconciling(Protocol):
    """Compares records, stored bytes and what runs. `modelops.server.reconcile` has the real one."""

    def run(self, job: JobId | None) -> Sequence[Found]:
        """Look at one job, or at all, now; repair what is wrong, and return what that was."""


class FoundView(msgspec.Struct, frozen=True):
    """Something that was not as recorded, and was repaired."""

    job: str
    kind: str
    text: str


class Reconciled(msgspec.Struct, frozen=True):
    """What a look at records, stored bytes and what runs has found.

    ``before``: what others had found already in the `RECENT` time before it, e.g. the look that is taken every minute.
    """

    findings: list[FoundView]
    before: list[FoundView] = []


class JobService:
    """The jobs of one store.

    Parameters
    ----------
    home
        Where uploads are received and bundles are unpacked.
    supervisor
        The drivers of this process; woken when there is something to do.
    reconciler
        Looks for what is not as recorded.
    max_jobs
        How many jobs that have not ended the server keeps.
    """

    def __init__(
        self,
        records: Records,
        objects: Objects,
        home: Home,
        supervisor: Driving,
        *,
        reconciler: Reconciling | None = None,
        max_jobs: int = MAX_JOBS,
    ) -> None:
        self.records, self.objects, self.home, self.supervisor = records, objects, home, supervisor
        self.uploads = Uploads(objects, home.cache / "uploads", home.cache / "bundles", records.now)
        self.files = JobFiles(records, objects)
        self.reconciler, self.max_jobs = reconciler, max_jobs
        self.started_at = records.now()

    # Submitting

    def submit(self, request: SubmitRequest, key: str | None, who: str) -> tuple[JobRow, bool]:
        """Check a request, store what its job needs, and record the job.

        Parameters
        ----------
        key
            Chosen by the client for this request; when it comes again, the answer is the same job.

        Returns
        -------
            The job, and whether it is new.

        Raises
        ------
        RequestError
            The request is wrong.
        BundleMissingError, ParametersMissingError
            Something has to be uploaded first.
        ConflictError
            The key was used for another request.
        QueueFullError
            There are too many jobs.
        """
        submission = Submission(key, request.digest()) if key is not None else None
        if submission is not None:
            known = submissions.submitted(self.records, submission)
            if known is not None:
                return known, False
        self._check(request)
        submissions.refuse_when_full(self.records, self.max_jobs)  # before anything is stored
        with self._parameters(request) as (n_params, write):
            job, lock = new_job_id(), self._known_lock(request.spec.bundle)
            try:
                with self.supervisor.beginning(job, request.spec.bundle, lock) as beginning:
                    row = self._store(job, request.spec, write, lock)
                    if n_params > MANY_SETS:
                        give_back_now()
                    recorded = submissions.record_submission(
                        self.records, row, submission, who=who, why=request.why, limit=self.max_jobs,
                        begin=None if beginning is None else beginning.take,
                    )  # fmt: skip
                    if beginning is not None and recorded.job == row.job:
                        beginning.recorded(recorded)
            except (RequestError, QueueFullError):
                self._forget(job)
                raise
        if recorded.job != row.job:  # another thread or server was faster
            self._forget(row.job)
            return recorded, False
        log.info(
            "job %s submitted by %s: %d replicates",
            row.job,
            who,
            request.spec.line.size,
            extra={"job": row.job},
        )
        if beginning is None:
            self.supervisor.wake()
        return recorded, True

    def _check(self, request: SubmitRequest) -> None:
        if not is_digest(request.spec.bundle) or not self.uploads.has_bundle(request.spec.bundle):
            digest = request.spec.bundle
            raise BundleMissingError(
                f"the server does not have the bundle {digest}; upload its archive to /v1/bundles/{digest}, then "
                "submit again"
            )
        check_spec(request.spec)
        check_why(request.why)
        if (request.parameters is None) == (request.parameters_sha256 is None):
            raise ConflictError(
                "give either parameters or parameters_sha256: a list of objects, or an uploaded file"
            )
        check_entries(request.spec, self.uploads.manifest(request.spec.bundle))

    @contextlib.contextmanager
    def _parameters(self, request: SubmitRequest) -> Iterator[tuple[int, _Write]]:
        """Check the parameter sets; yield how many there are, and what stores them for a job."""
        if request.parameters is not None:
            check_count(request.spec, len(request.parameters))
            canonicals, ids = canonical_forms(bytes(text) for text in request.parameters)
            yield len(canonicals), partial(write_parameters, canonicals=canonicals, ids=ids)
            return
        with SpooledTemporaryFile(IN_MEMORY_BYTES) as checked:
            with (
                temporary_files_are("the parameters of a job"),
                self.uploads.parameters(request.parameters_sha256 or "") as file,
            ):
                n = pour_uploaded(file, checked)
            check_count(request.spec, n)
            yield n, partial(put_parameters, file=checked)

    def _known_lock(self, bundle: str) -> Lock | None:
        # Here and not above: a server answers before it needs what makes environments.
        from modelops.server.job_files import known_lock

        return known_lock(self.home.cache, bundle)

    def _store(self, job: JobId, spec: JobSpec, write_parameters: _Write, lock: Lock | None) -> JobRow:
        """Store the bytes of a job that has no row yet; return the row it is to get. ``lock``: if it is known."""
        data = encode_spec(spec)
        beside = {"study.json": data}
        if lock is not None:
            beside["lock"] = lock.text.encode()  # stored together with the others it takes no time of its own
        write_parameters(self.objects, job, beside=beside)
        return new_row(job, data, name=spec.name, bundle=spec.bundle, at=self.records.now())

    def _forget(self, job: JobId) -> None:
        """Remove what was stored for a job that, for certain, was not recorded."""
        for name in ("study.json", "parameters.parquet", "lock"):
            self.objects.delete(f"{job_folder(job)}/{name}")

    # Looking

    def status(self, job: str) -> JobView:
        """Return a job as it is now. Raises NotFoundError."""
        live = self.supervisor.view(JobId(job))  # first: what is committed meanwhile is no longer running
        picture = overview.picture(self.records, JobId(job))
        return view_of(picture, live, len(self.supervisor.workers()))

    def as_submitted(self, row: JobRow) -> JobView:
        """Return a new job as it was recorded."""
        return view_of(overview.Picture(row, {}, {}), None, len(self.supervisor.workers()))

    def jobs(
        self, *, states: Collection[JobState] = (), match: str = "", before: str = "", limit: int = 100
    ) -> list[JobView]:
        """Return jobs, newest first; see `modelops.store.overview.page_of_jobs`."""
        pictures = overview.page_of_jobs(self.records, states=states, match=match, before=before, limit=limit)
        n_workers = len(self.supervisor.workers())
        return [view_of(p, self.supervisor.view(p.row.job), n_workers) for p in pictures]

    def jobs_by_state(self) -> dict[JobState, int]:
        """Return how many jobs are in each state."""
        return overview.jobs_by_state(self.records)

    def events(self, job: str, after: int = 0, limit: int | None = None) -> list[EventRow]:
        """Return the story of a job, from the event after number ``after`` on. Raises NotFoundError."""
        found = self.records.events(JobId(job), after, limit)
        if not found:
            self.records.job(JobId(job))
        return found

    def answer(self, job: str, act: Callable[[JobContents], T]) -> T:
        """Return what ``act`` makes of what is committed; it is asked again once damage that it met is repaired.

        Parameters that are lost cannot be: then it is asked to do without.

        Raises
        ------
        NotFoundError
            There is no such job.
        IntegrityError
            What is damaged cannot be repaired by this server.
        """
        contents = self.contents(job)
        try:
            return act(contents)
        except (IntegrityError, NotFoundError):
            if (bare := contents.without_parameters()) is not None:
                return act(bare)
            if self.reconciler is None or not self.reconciler.run(JobId(job)):
                raise
            return act(self.contents(job))

    def write_finished(self, job: str, table: str, file: IO[bytes]) -> bool:
        """Write a table of a job that has ended, from its result file; False if there is none, or it is damaged."""
        row = self.records.job(JobId(job))
        if row.state not in FINAL_JOB_STATES:
            return False
        written = next((f for f in self.records.result_files(row.job) if f.name == f"{table}.parquet"), None)
        if written is None:
            return False
        try:
            stream_result_file(self.objects, row.job, written, file)
        except (
            IntegrityError,
            NotFoundError,
        ) as e:  # a look will find it and make it anew; here it is not needed
            log.warning("%s; the table is read from segments", e)
            return False
        return True

    def contents(self, job: str) -> JobContents:
        """Return what is committed of a job, to read tables and outputs from. Raises NotFoundError."""
        live = self.supervisor.view(JobId(job))
        return JobContents.of(
            self.objects, self.records, JobId(job), live.running if live is not None else EMPTY
        )

    def spec(self, job: str) -> JobSpec:
        """Return the frozen record of what a job is. Raises NotFoundError."""
        return recorded_spec(self.records.job(JobId(job)).spec, job)

    def parameter_set(self, job: str, param: int | str) -> ParameterSet:
        """Return a parameter set by its ordinal or its id. Raises NotFoundError."""
        sets = Parameters(self.objects, JobId(job), self.spec(job).parameters)
        try:
            return sets[sets.param_of(param) if isinstance(param, str) else param]
        except (KeyError, IndexError):
            raise NotFoundError(
                f"job {job} has no parameter set {param}: it has {len(sets)}, 0 to {len(sets) - 1}"
            ) from None

    def lock(self, job: str) -> bytes:
        """Return the lock of a job's environment. Raises NotFoundError, also before it was resolved."""
        state = self.records.job(JobId(job)).state
        try:
            return self.objects.get(f"{job_folder(JobId(job))}/lock")
        except NotFoundError:
            raise NotFoundError(f"job {job} is {state}; its environment was not resolved yet") from None

    def output(
        self, job: str, param: int | str, replicate: int, name: str | None
    ) -> tuple[bool, list[StoredOutput]]:
        """Return the outputs of a replicate as they are stored, and whether the model returned a dict.

        Raises
        ------
        NotFoundError
            There is no such job, replicate or output, or the replicate has not succeeded; says which.
        """
        with _found():
            return self.contents(job).stored(param, replicate, name)

    def aggregate(self, job: str, param: int | str, target: str | None) -> tuple[bool, list[StoredOutput]]:
        """Return an aggregate of a parameter set as it is stored; ``target`` None: the only one there is.

        Raises
        ------
        NotFoundError
            There is no such job, parameter set or aggregate, it did not succeed, or which one is meant is not said;
            says why.
        """
        contents = self.contents(job)
        targets = contents.spec.aggregates
        if target is None and len(targets) != 1:
            raise NotFoundError(
                f"job {job} has {len(targets)} aggregates; name one of {', '.join(targets) or 'none'}"
            )
        with _found():
            return stored_aggregate(contents, param, target or targets[0])

    def printed(self, job: str, param: int | str | None, replicate: int | None) -> Iterator[str]:
        """Yield what the bundle printed: of one replicate, one parameter set, or the whole job."""
        return log_texts(self.contents(job), param, replicate)

    # Acting

    def cancel(self, job: str, who: str, *, at_once: bool = False) -> JobView:
        """Ask for the end of a job; asking again changes nothing.

        Parameters
        ----------
        at_once
            Wait for nothing that its workers could still hand in; also for a job that is ending already.

        Raises
        ------
        ConflictError
            It has ended otherwise.
        """
        if not self.records.ask_cancel(JobId(job), who):
            view = self.status(job)
            if view.state is not JobState.CANCELLED:
                raise ConflictError(f"job {job} is {view.state} already; there is nothing to cancel")
            return view
        if at_once:
            self.supervisor.abandon(JobId(job), who)
        self.supervisor.wake()
        return self.status(job)

    def resume(self, job: str, request: ResumeRequest, key: str | None, who: str) -> JobView:
        """Let a job that has ended run what is missing of it; see `modelops.server.extend.resume_job`.

        Parameters
        ----------
        key
            As for `submit`: when the same request comes again it begins nothing twice.

        Raises
        ------
        RequestError
            Nothing is missing.
        ConflictError
            The job has not ended.
        """

        def begin(asked: Submission | None) -> None:
            resume_job(self.records, self.objects, JobId(job), who, failed=request.failed, asked=asked)

        return self._once(job, request, key, begin)

    def extend(self, job: str, request: ExtendRequest, key: str | None, who: str) -> JobView:
        """Add to a job that has ended; see `modelops.server.extend.extend_job`. Errors as `resume`."""

        def begin(asked: Submission | None) -> None:
            more = self._more_parameters(request)
            try:
                extend_job(
                    self.records, self.objects, JobId(job), who, replicates=request.replicates,
                    parameters=more, seeds=request.seeds, asked=asked,
                )  # fmt: skip
            except RequestError as e:  # right by itself, it does not fit the job
                raise e if isinstance(e, NotFoundError) else ConflictError(str(e)) from e

        check_extension(request.replicates, request.seeds)

        return self._once(job, request, key, begin)

    def reconcile(self, job: str | None = None) -> Reconciled:
        """Compare records, stored bytes and what runs, of one job or of all, and repair what is wrong."""
        if job is not None:
            self.records.job(JobId(job))
        if self.reconciler is None:
            raise ClusterError("this server cannot reconcile: it was started without what does that")
        which = None if job is None else JobId(job)
        before = [
            FoundView(of, str(event.data.get("kind", "")), event.text)
            for of, event in self.records.mismatches_since(self.records.now() - RECENT, which)
        ]
        found = self.reconciler.run(which)
        return Reconciled([FoundView(f.job, str(f.kind), f.told) for f in found], before)

    def _once(
        self,
        job: str,
        request: ResumeRequest | ExtendRequest,
        key: str | None,
        begin: Callable[[Submission | None], None],
    ) -> JobView:
        """Let a job begin again, unless the same request has done so before."""
        row = self.records.job(JobId(job))
        asked = Submission(key, request.digest(job)) if key is not None else None
        if asked is None or submissions.submitted(self.records, asked) is None:
            if row.state not in FINAL_JOB_STATES:  # before anything is read or stored
                raise ConflictError(f"job {job} is {row.state}; wait until it has ended, or cancel it")
            submissions.refuse_when_full(self.records, self.max_jobs)
            try:
                begin(asked)
            except ChangedMeanwhileError as e:
                if asked is None or submissions.submitted(self.records, asked) is None:
                    raise ConflictError(str(e)) from e
            self.supervisor.wake()
        return self.status(job)

    def _more_parameters(self, request: ExtendRequest) -> list[bytes] | None:
        if request.parameters is not None and request.parameters_sha256 is not None:
            raise ConflictError("give either parameters or parameters_sha256, not both")
        if request.parameters is not None:
            return canonical_forms(bytes(text) for text in request.parameters)[0]
        if request.parameters_sha256 is not None:
            with self.uploads.parameters(request.parameters_sha256) as file:
                return canonical_forms(texts_of_file(file))[0]
        return None


@contextlib.contextmanager
def _found() -> Iterator[None]:
    """Say in a sentence that what was named is not there."""
    try:
        yield
    except KeyError as error:
        raise NotFoundError(error.args[0] if error.args else str(error)) from error
