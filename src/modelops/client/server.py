"""Which server: the one that the settings name (MODELOPS_SERVER), or that of this user on this machine.

What changes something starts the server of this machine when none runs. What only looks starts nothing: a job that has
ended can be read from the store, since nothing changes it while no server runs, and of one that has not ended nothing
is known then.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any, Final, TypeVar

from modelops.client.http import Address, Http, checked_url
from modelops.client.served import HttpSource, Summary, ambiguous
from modelops.client.status import UNKNOWN, JobStatus
from modelops.errors import NotFoundError, RequestError, ServerUnreachableError
from modelops.home import Home, refuse_no_folder
from modelops.settings import Settings
from modelops.states import FINAL_JOB_STATES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from modelops.client.job import Job
    from modelops.store import JobRow, Records

T = TypeVar("T")
LOCAL: Final = "the server of this machine"
_UP: Final = "'modelops up' starts it, and it goes on with what has not ended"


def remote(url: str, token: str | None) -> Callable[[], Address]:
    """Return what finds a server elsewhere: it is always there.

    Raises
    ------
    RequestError
        There is no token.
    """
    if not token:
        raise RequestError(
            f"the server {url} needs a token: ask its operator for one ('modelops tokens create NAME' makes it), and "
            "set MODELOPS_TOKEN, or give mo.Client(url, token=...)"
        )
    advice = "check the address in MODELOPS_SERVER and the network; jobs go on meanwhile"
    no_entry = (
        "ask its operator for another ('modelops tokens create NAME' makes one), and set MODELOPS_TOKEN to it"
    )
    address = Address(url, token, f"the server {url}", advice, no_entry)
    return lambda: address


class Local:
    """Finds the server of a home, again before every request: its port may change when it is started again."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def __call__(self) -> Address:
        """Return where it is. Raises ServerUnreachableError if none runs."""
        from modelops.cluster.launch import find_server

        found = find_server(self._home)
        if found is None:
            raise ServerUnreachableError(LOCAL, f"none runs for {self._home.data}", _UP)
        return Address(found.url, found.token, f"{LOCAL} ({found.url})", "'modelops status' shows what runs")

    def runs(self) -> bool:
        """Say whether there is one."""
        try:
            self()
        except ServerUnreachableError:
            return False
        return True


def connect(
    environ: Mapping[str, str] = os.environ, *, url: str | None = None, token: str | None = None
) -> HttpSource:
    """Return the jobs of the server in charge; start the one of this machine unless it runs.

    Parameters
    ----------
    url, token
        Instead of those in the settings (``MODELOPS_SERVER``, ``MODELOPS_TOKEN``, ``config.toml``).
    """
    settings = Settings.read(environ, server=None if url is None else checked_url(url), token=token)
    home = Home.of(settings)
    if settings.server is not None:
        return HttpSource(_elsewhere(os.getpid(), settings.server, settings.token, settings.ca), home)
    return served_at(home, settings.ca)


def served_at(home: Home, ca: Path | None = None) -> HttpSource:
    """Return the jobs of the server of this home, started unless one runs.

    One whose process lives is not asked whether it answers: the request shows it, and who only looks at a job then
    says *unknown* within seconds.
    """
    from modelops.cluster.launch import ensure_server, is_running

    if not is_running(home):
        ensure_server(home)
    return HttpSource(_here(os.getpid(), home, ca), home)


# A process has one set of connections to a server, and its jobs share it; a fork of it has its own.


@functools.lru_cache(maxsize=8)
def _here(_pid: int, home: Home, ca: Path | None) -> Http:
    return Http(Local(home), ca=ca)


@functools.lru_cache(maxsize=8)
def _elsewhere(_pid: int, url: str, token: str | None, ca: Path | None) -> Http:
    return Http(remote(url, token), ca=ca)


def is_elsewhere(environ: Mapping[str, str] = os.environ) -> bool:
    """Say whether the settings name a server, which then is not looked for on this machine."""
    return Settings.read(environ).server is not None


def running(environ: Mapping[str, str] = os.environ) -> HttpSource | None:
    """Return the jobs of the server in charge, None if none runs on this machine; starts none."""
    settings = Settings.read(environ)
    if settings.server is not None:
        return connect(environ)
    home = Home.of(settings)
    refuse_no_folder(home)
    return HttpSource(_here(os.getpid(), home, settings.ca), home) if Local(home).runs() else None


# Looking while no server runs


def look_at(text: str, environ: Mapping[str, str] = os.environ) -> Job:
    """Return the job that an id, or a beginning or end of one, names: of the server, or as it is stored here.

    Raises
    ------
    NotFoundError
        There is no such job.
    ServerUnreachableError
        No server runs, and the job has not ended: nothing is known of it.
    """
    from modelops.client.client import Client
    from modelops.client.job import Job
    from modelops.study.spec import unreadable

    if (source := running(environ)) is not None:
        return Client(source=source).job(text)
    home = Home.from_environ(environ)
    row = _recorded(home, text)
    if row.state in FINAL_JOB_STATES:
        return Job(row.job, home)
    wrong = unreadable(row.spec)
    advice = f"one that is started leaves this job alone: {wrong}" if wrong else _UP
    raise ServerUnreachableError(LOCAL, f"none runs for {home.data}, and job {row.job} has not ended", advice)


def last_recorded(
    text: str, silent: ServerUnreachableError, environ: Mapping[str, str] = os.environ
) -> tuple[str, JobStatus]:
    """Return the id of a job and what is known of it while the server is away or silent: unknown since its change."""
    from modelops.study.spec import unreadable

    home = Home.from_environ(environ)
    row = _recorded(home, text)
    why = str(silent) if Local(home).runs() else f"no server runs; {_UP}"
    if wrong := unreadable(row.spec):
        why += f"; it leaves this job alone: {wrong}"
    since = row.changed_at
    at = f"{since.astimezone():%Y-%m-%d %H:%M:%S}"
    return row.job, JobStatus(
        state=UNKNOWN, counts={}, aggregates={}, unknown_since=since, last_known=row.state,
        reason=f"unknown since {at} (last recorded: {row.state}): {why}",
    )  # fmt: skip


def recorded_jobs(environ: Mapping[str, str], states: Collection[str], limit: int | None) -> list[Summary]:
    """Return the jobs that are recorded on this machine, newest first; those that have not ended as unknown."""

    def summaries(records: Records) -> list[Summary]:
        rows = [row for row in records.jobs() if not states or row.state in states]
        return [_summary(records, row) for row in rows[:limit]]

    return _looked_up(Home.from_environ(environ), summaries)


def recorded_by_state(environ: Mapping[str, str]) -> dict[str, int]:
    """Return how many jobs are recorded on this machine, by the state that is recorded of them."""
    from modelops.store.overview import jobs_by_state

    found = _looked_up(Home.from_environ(environ), lambda records: list(jobs_by_state(records).items()))
    return {str(state): n for state, n in found}


def _summary(records: Records, row: JobRow) -> Summary:
    """Return a line of the list; with the counts of a job that has ended, which change no more."""
    from modelops.study.spec import read_or_why

    ended = row.state in FINAL_JOB_STATES
    spec, why = read_or_why(row.spec)
    known: dict[str, Any] = {"unreadable": why}
    if ended and spec is not None:
        known |= {
            "bundle_name": spec.bundle_name,
            "n_params": spec.line.n_params,
            "n_replicates": max((n for _, _, n in spec.line.replicates()), default=0),
            "size": spec.line.size,
            "counts": {str(status): n for status, n in records.counts(row.job).items()},
        }
    return Summary(
        job=row.job, name=row.name, bundle=row.bundle, run=row.run, state=row.state if ended else UNKNOWN,
        reason=row.reason, created_at=row.created_at, changed_at=row.changed_at, **known,
    )  # fmt: skip


def _recorded(home: Home, text: str) -> JobRow:
    fitting = [row for row in _rows(home) if _fits(row.job, text)]
    if not fitting:
        raise NotFoundError(f"there is no job {text!r} in {home.data}; 'modelops jobs list --all' shows all")
    if len(fitting) > 1:
        ambiguous(text, [row.job for row in fitting])
    return fitting[0]


def _fits(job: str, text: str) -> bool:
    return bool(text) and (job.startswith((text, f"job_{text}")) or job.endswith(text))


def _rows(home: Home) -> list[JobRow]:
    return _looked_up(home, lambda records: records.jobs())


def _looked_up(home: Home, what: Callable[[Records], list[T]]) -> list[T]:
    from modelops.store import Records

    if (file := home.database_file) is not None and not file.exists():
        return []  # looking makes no database
    records = Records.open(home.database_url)
    try:
        return what(records)
    finally:
        records.close()
