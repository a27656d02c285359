"""`Client`: the jobs of one server."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

from modelops.client.job import Job
from modelops.client.served import JobsPage, Summary, ambiguous
from modelops.client.server import connect, running
from modelops.errors import NotFoundError
from modelops.home import Home

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Self

    from modelops.client.served import HttpSource
    from modelops.study import Study

PAGE: Final = 200
LIST_READ_S: Final = 10.0  # how long a page of jobs is waited for, whoever has so many
LIST_PATIENCE_S: Final = 3.0
SUBMITTING: Final = "submitting"
STARTING: Final = "starting the server, which ends by itself half an hour after it was last needed"
_PART: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_WHOLE_ID: Final = re.compile(r"job_[0-9a-f]{32}")


class Client:
    """The jobs of a server. Safe to use from many threads; may be used in a ``with`` block.

    Parameters
    ----------
    url
        Of the server; default ``MODELOPS_SERVER``, else the server of this user on this machine, which is started
        unless it runs.
    token
        What lets one in; default ``MODELOPS_TOKEN``, for the server of this machine its own.

    Raises
    ------
    RequestError
        The address cannot be one, or its token is missing.
    """

    def __init__(
        self, url: str | None = None, token: str | None = None, *, source: HttpSource | None = None
    ) -> None:
        self.source = source or connect(os.environ, url=url, token=token)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self.source.http.close()

    def job(self, id: str) -> Job:  # noqa: A002  the word of the field
        """Return a job by its id, or by a beginning or end of it that no other job has.

        Raises
        ------
        NotFoundError
            There is no such job.
        RequestError
            Several jobs have that beginning or end.
        """
        if _WHOLE_ID.fullmatch(id):
            return Job(id, source=self.source)
        found = [job.job for job in self.summaries(match=id)] if _PART.fullmatch(id) else []
        if not found:
            raise NotFoundError(f"there is no job {id!r}; 'modelops jobs list --all' shows all")
        if len(found) > 1:
            ambiguous(id, found)
        return Job(found[0], source=self.source)

    def jobs(self, states: Iterable[str] = ()) -> list[Job]:
        """Return all jobs (in these states), newest first."""
        return [Job(found.job, source=self.source) for found in self.summaries(states)]

    def summaries(
        self, states: Iterable[str] = (), *, match: str | None = None, limit: int | None = None
    ) -> Iterator[Summary]:
        """Yield what the server says of each job, newest first, page by page."""
        cursor: str | None = None
        left = limit
        while left is None or left > 0:
            query: list[tuple[str, str | int | float | None]] = [("state", str(state)) for state in states]
            n = PAGE if left is None else min(PAGE, left)
            query += [("limit", n), ("cursor", cursor), ("match", match)]
            page = self.source.http.get(
                "/jobs", query, read_s=LIST_READ_S, patience_s=LIST_PATIENCE_S
            ).as_type(JobsPage)
            yield from page.jobs
            left = None if left is None else left - len(page.jobs)
            cursor = page.next
            if cursor is None:
                return

    def jobs_by_state(self) -> dict[str, int]:
        """Return how many jobs the server has in each state; those with none are left out."""
        found = self.source.http.get("/server", read_s=LIST_READ_S, patience_s=LIST_PATIENCE_S).as_type(dict)
        return {str(state): int(n) for state, n in found["jobs"].items()}

    def submit(self, study: Study) -> Job:
        """Record a study as a job, and return it at once; the server runs it.

        Raises
        ------
        RequestError, BundleError
            The study or the bundle is wrong; no job was recorded.
        RetryableError
            The queue is full; no job was recorded.
        """
        from modelops.client import submission

        prepared = submission.prepared(study, self.source.home, lambda: self.source)
        return Job(submission.submit(prepared, self.source), source=self.source)


def submit(study: Study, *, on_stage: Callable[[str], None] = lambda _text: None) -> Job:
    """Record a study as a job, and return it at once; it outlives this process.

    The server that ``MODELOPS_SERVER`` names runs it, else that of this user on this machine, which is started
    unless it runs.

    Parameters
    ----------
    on_stage
        Told what is being done.

    Raises
    ------
    RequestError, BundleError
        The study or the bundle is wrong; no job was recorded, and no server was started for it.
    RetryableError
        The queue is full; no job was recorded.
    ServerUnreachableError
        The server does not answer.
    """
    from modelops.client import submission

    source: list[HttpSource] = []

    def connected() -> HttpSource:
        if not source:
            on_stage("looking for the server" if running() is not None else STARTING)
            source.append(connect())
        return source[0]

    on_stage("preparing the bundle")
    prepared = submission.prepared(study, Home.from_environ(os.environ), connected)
    connected()
    on_stage(SUBMITTING)
    return Job(submission.submit(prepared, connected()), source=connected())
