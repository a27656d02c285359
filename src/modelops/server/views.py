"""What is said of a job: counts from what is committed, and from its driver what cannot be stored.

A replicate is in exactly one count. Those with an outcome are counted from committed segments; of the others
those that a live attempt of a driver in this process holds are ``running``; the rest is ``pending``, or what
the job's state makes of it.
"""

from __future__ import annotations

from datetime import datetime
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from modelops.states import FINAL_JOB_STATES, JobState, ReplicateStatus
from modelops.store.contents import rest_of
from modelops.study.index_line import IndexLine
from modelops.study.spec import JobSpec, read_or_why

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from contextlib import AbstractContextManager

    from modelops.environments import Lock
    from modelops.server.beginning import Beginning
    from modelops.store.overview import Picture
    from modelops.study.ids import JobId
    from modelops.study.pools import Aliases, Membership
    from modelops.study.ranges import Ranges


class Reported(Protocol):
    """What a running replicate last said of itself."""

    @property
    def index(self) -> int: ...  # noqa: D102
    @property
    def fraction(self) -> float | None: ...  # noqa: D102
    @property
    def values(self) -> Mapping[str, Any]: ...  # noqa: D102


class LivePool(Protocol):
    """A pool as the driver of a job sees it."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def workers(self) -> int: ...  # noqa: D102
    @property
    def slots(self) -> int: ...  # noqa: D102
    @property
    def running(self) -> int: ...  # noqa: D102
    @property
    def waiting_since(self) -> datetime | None: ...  # noqa: D102


class Live(Protocol):
    """What a driver sees of its job that no row holds.

    ``eta``: seconds left, None if unknown. ``waiting_for``: what the database or the storage said, while one of them is
    away. ``stalled``: why it stands still, if it does. ``doing``: what is done before replicates can run.
    ``sleeps_until``: when its first delayed retry may run, if there is nothing but such.
    """

    @property
    def running(self) -> Ranges: ...  # noqa: D102
    @property
    def eta(self) -> float | None: ...  # noqa: D102
    @property
    def progress(self) -> Sequence[Reported]: ...  # noqa: D102
    @property
    def waiting_for(self) -> str: ...  # noqa: D102
    @property
    def stalled(self) -> str: ...  # noqa: D102
    @property
    def doing(self) -> str: ...  # noqa: D102
    @property
    def pools(self) -> Sequence[LivePool]: ...  # noqa: D102
    @property
    def sleeps_until(self) -> float | None: ...  # noqa: D102


class Driving(Protocol):
    """The drivers of this process, and their workers. `modelops.server.supervisor` has the real one."""

    @property
    def aliases(self) -> Aliases:
        """Which names of pools mean the same."""

    def wake(self) -> None:
        """Look for jobs to drive, and for what was asked of them, now."""

    def beginning(
        self, job: JobId, bundle: str, lock: Lock | None
    ) -> AbstractContextManager[Beginning | None]:
        """Drive a new job as soon as it is recorded, which happens in this block; None: it must wait its turn."""

    def abandon(self, job: JobId, who: str) -> None:
        """End a job as cancelled, if it is driven here, without waiting for what its workers could still hand in."""

    def view(self, job: JobId) -> Live | None:
        """Return what the driver of a job sees; None if it is not driven here."""

    def goes_on(self, job: JobId) -> bool:
        """Say whether a job is driven here and its end is not recorded; whoever listens will be told of that."""

    def driven(self) -> Collection[JobId]:
        """Return the jobs that are driven here."""

    def workers(self) -> dict[str, int]:
        """Return the workers' addresses, and how many replicates each runs at a time."""

    def membership(self, worker: str) -> Membership:
        """Return what a worker says of its pool."""

    def refused(self) -> dict[str, str]:
        """Return the workers that get no work as their versions do not fit, and a table of these."""

    def connected(self) -> bool:
        """Say whether the Dask scheduler answers."""

    def listen(self, listener: Callable[[JobId, bool], None]) -> None:
        """Let this one be told, on any thread, of each change of a job's state, and whether it has ended."""


# After a restart of the server the workers go on; until a driver has asked them, nobody here knows with what.
# A job that another server or a local run drives is never taken up here.
_UNDRIVEN: Final = {
    JobState.RUNNING: "this server does not drive it, or not yet; which of the pending replicates run is not known",
}


class ProgressView(msgspec.Struct, frozen=True):
    """How far a running replicate is. ``fraction``: of its work, 0 to 1; ``values``: whatever it reports."""

    param: int
    replicate: int
    fraction: float | None
    values: dict[str, Any]


class PoolView(msgspec.Struct, frozen=True, kw_only=True):
    """A pool of workers as a job sees it.

    ``name``: as the study asks for it. ``asked``: it does; otherwise the job runs everywhere, and workers are in this
    pool. ``workers``, ``slots``: connected now. ``counts``: the job's replicates in it, by status. ``waiting_since``:
    since when the job asks for it and no worker of it is connected; null if there is one, or the job has ended.
    """

    name: str
    asked: bool
    workers: int
    slots: int
    counts: dict[str, int]
    waiting_since: datetime | None


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job as it is now.

    ``counts``: replicates by status; they add up to ``size``. ``aggregates``: aggregates by status.
    ``n_replicates``: of a parameter set, at most. ``eta``: seconds left, null if unknown. ``stalled``: why it
    does not get on, or empty. ``waiting_for``: what the database or the storage said, while one of them is away and the
    job waits. ``doing``: what is done before replicates can run, e.g. which packages are installed. ``driven``: a
    driver of this server has it, or it is kept aside until a worker comes that can run it, or a delay is over.
    ``pools``: those that it asks for, or else those where it ran or could. ``unreadable``: why this server cannot read
    the job's study, and then does not drive it; ``size`` is what is committed then. ``tag``: changes when anything else
    here changes, but ``eta``.
    """

    job: str
    name: str
    bundle: str
    bundle_name: str
    state: JobState
    reason: str
    run: int
    version: int
    created_at: datetime
    changed_at: datetime
    n_params: int
    n_replicates: int
    size: int
    counts: dict[str, int]
    aggregates: dict[str, int]
    eta: float | None
    stalled: str
    waiting_for: str
    doing: str
    cancel_asked: bool
    driven: bool
    n_workers: int
    progress: list[ProgressView]
    pools: list[PoolView]
    n_events: int
    unreadable: str = ""
    tag: str = ""


def view_of(picture: Picture, live: Live | None, n_workers: int) -> JobView:
    """Put together what is committed and what its driver says; ``live`` must have been asked first."""
    row = picture.row
    known, unreadable = read_or_why(row.spec)
    spec = known or _NOTHING_KNOWN
    size = sum(picture.counts.values()) if unreadable else spec.line.size
    if row.state in FINAL_JOB_STATES:
        live = None  # it was asked before the end, and knew of replicates that ran then
    view = JobView(
        job=row.job,
        name=row.name,
        bundle=row.bundle,
        bundle_name=spec.bundle_name,
        state=row.state,
        reason=row.reason,
        run=row.run,
        version=row.version,
        created_at=row.created_at,
        changed_at=row.changed_at,
        n_params=spec.line.n_params,
        n_replicates=_replicates_of_a_set(spec),
        size=size,
        counts=_counts(picture, size, live),
        aggregates=picture.aggregates,
        eta=live.eta if live is not None else None,
        stalled=row.stalled or (live.stalled if live is not None else ""),
        waiting_for=live.waiting_for if live is not None else "",
        doing=live.doing if live is not None else "" if unreadable else _UNDRIVEN.get(row.state, ""),
        cancel_asked=row.cancel_by is not None,
        driven=live is not None,
        n_workers=n_workers,
        progress=_progress(spec, live),
        pools=_pools(spec, picture, live),
        n_events=row.n_events,
        unreadable=unreadable,
    )
    said = msgspec.json.encode(msgspec.structs.replace(view, eta=None), order="deterministic")
    return msgspec.structs.replace(view, tag=blake2b(said, digest_size=8).hexdigest())


_NOTHING_KNOWN: Final = JobSpec(name="", bundle="", bundle_name="", model="", line=IndexLine(()))


def _counts(picture: Picture, size: int, live: Live | None) -> dict[str, int]:
    counts = dict(picture.counts)
    left = size - sum(counts.values())
    n_running = min(len(live.running), left) if live is not None else 0
    for status, n in ((ReplicateStatus.RUNNING, n_running), (rest_of(picture.row.state), left - n_running)):
        if n:
            counts[str(status)] = counts.get(str(status), 0) + n
    return counts


def _replicates_of_a_set(spec: JobSpec) -> int:
    """Return how many replicates a parameter set has, or the one that has most."""
    blocks = spec.line.blocks
    edges = sorted({b.p0 for b in blocks})  # the number changes only where a block begins or ends
    return max(
        (sum(b.n_replicates for b in blocks if b.p0 <= p < b.p0 + b.n_params) for p in edges), default=0
    )


def _progress(spec: JobSpec, live: Live | None) -> list[ProgressView]:
    out = []
    for reported in live.progress if live is not None else ():
        param, replicate = spec.line.locate(reported.index)
        out.append(ProgressView(param, replicate, reported.fraction, dict(reported.values)))
    return out


def _pools(spec: JobSpec, picture: Picture, live: Live | None) -> list[PoolView]:
    lives = {pool.name: pool for pool in (live.pools if live is not None else ())}
    asked = spec.asked_pools
    found = []
    for name in dict.fromkeys((*asked, *lives, *picture.pools)):
        now, counts = lives.get(name), picture.pools.get(name, {})
        if now is not None and now.running:
            counts = {**counts, str(ReplicateStatus.RUNNING): now.running}
        found.append(
            PoolView(
                name=name,
                asked=name in asked,
                workers=0 if now is None else now.workers,
                slots=0 if now is None else now.slots,
                counts=counts,
                waiting_since=None if now is None else now.waiting_since,
            )
        )
    return found
