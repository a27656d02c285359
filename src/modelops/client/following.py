"""Look at a job until it has ended, through times when its server is away: for `watch`, logs and copies alike."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final, TypeVar

from modelops.errors import ServerUnreachableError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from modelops.client.job import Job
    from modelops.client.status import JobStatus

PAUSE_S: Final = 0.5
REST_S: Final = 25.0
T = TypeVar("T")


class Following:
    """A job that somebody follows.

    Parameters
    ----------
    seen
        Told each status, also the unknown ones while the server is away.
    patience_s
        How long the server may be away; None: for ever.
    """

    def __init__(
        self,
        job: Job,
        seen: Callable[[JobStatus], None],
        *,
        patience_s: float | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job, self._seen, self._patience_s = job, seen, patience_s
        self._sleep, self._clock = sleep, clock
        self._status: JobStatus | None = None
        self._away: float | None = None

    def look(self, look_s: float) -> JobStatus:
        """Return the status when it differs from the last one, or after about so long; at once the first time.

        Raises
        ------
        ServerUnreachableError
            The server has been away for longer than it may.
        """
        if self._status is not None and self._status.unknown_since is not None:
            self._sleep(PAUSE_S)
        status = self._status = self.job.source.wait_for_change(self.job.id, self._status, look_s)
        self._seen(status)
        if status.unknown_since is None:
            self._away = None
            return status
        now = self._clock()
        self._away = now if self._away is None else self._away
        if self._patience_s is not None and now - self._away > self._patience_s:
            raise ServerUnreachableError(
                f"the server of job {self.job.id}", f"it has been away for {now - self._away:.0f} s",
                f"the job is recorded: 'modelops jobs watch {self.job.id}' goes on watching when the server is back",
            )  # fmt: skip
        return status

    def rest(self, seconds: float) -> None:
        """Let so much time pass, less if the job ends meanwhile."""
        until = self._clock() + seconds
        while (left_s := until - self._clock()) > 0:
            status = self.job.source.wait_for_end(self.job.id, min(left_s, REST_S))
            if status.final:
                return
            if status.unknown_since is not None:
                self._sleep(min(left_s, PAUSE_S))

    def to_the_end(self) -> JobStatus:
        """Wait until the job has ended, however long its server is away, and return its status."""
        while True:
            status = self.job.source.wait_for_end(self.job.id, REST_S)
            self._seen(status)
            if status.final:
                return status
            if status.unknown_since is not None:
                self._sleep(PAUSE_S)

    def ask(self, question: Callable[[], T]) -> T:
        """Return the answer to a question about the job; asked again when the server was away meanwhile."""
        while True:
            try:
                return question()
            except ServerUnreachableError:
                self._sleep(PAUSE_S)  # it may answer for the job, and not for this
                self._status = None
                while self.look(0).unknown_since is not None:
                    pass
                self._status = None  # whoever looks next is told at once what was seen here


class Outages:
    """Words for a server that is away, and back: each once."""

    def __init__(self) -> None:
        self._away = False

    def line(self, status: JobStatus) -> str:
        """Return what is new of the connection, empty if nothing is."""
        was, self._away = self._away, status.unknown_since is not None
        if was == self._away:
            return ""
        return f"{status.reason}; connecting again" if self._away else "connected again"


def job_to_follow(text: str, say: Callable[[str], None], environ: Mapping[str, str] = os.environ) -> Job:
    """Return the job that an id, or a beginning or end of one, names.

    For a part of one, a server that is away is asked until it answers, as it is for the job itself afterwards.

    Raises
    ------
    NotFoundError
        There is no such job.
    ServerUnreachableError
        No server runs on this machine, and none is named elsewhere; the job has not ended.
    """
    from modelops.client.client import Client
    from modelops.client.server import look_at, running

    said = False
    while (source := running(environ)) is not None:
        try:
            job = Client(source=source).job(text)
        except ServerUnreachableError as error:
            if not said:
                say(f"{error}; connecting again")
            said = True
            time.sleep(PAUSE_S)
        else:
            if said:
                say("connected again")
            return job
    return look_at(text, environ)
