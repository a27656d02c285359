"""Which workers a job may use, by the pools it asks for, and which of these have none.

Whatever is placed, is placed on workers of the roster, and a worker of no pool that was asked for never enters it: so
retries, recalls, suspects and adopted attempts need not know of pools. A worker counts for the first pool that it is
of, in the study's order; those of a job that runs everywhere count for the pool they are in.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

from modelops.driver import commands as c
from modelops.study.pools import NO_ALIASES
from modelops.study.wording import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modelops.driver.course import Course
    from modelops.driver.events import WorkerJoined
    from modelops.driver.outbox import Outbox
    from modelops.study.pools import Aliases

PATIENCE_S: Final = 2.0  # before the job's story says that a pool has no worker: one may be starting again
WAITS, JOINED = "pool_waits", "pool_joined"  # kinds of events


def waits_text(pool: str, n_refused: int = 0) -> str:
    """Return what the job's story says of a pool without workers. ``n_refused``: those of it that get no work."""
    if not n_refused:
        return f"{_waits(pool)}is connected"
    are = f"{counted(n_refused, 'worker')} {'is' if n_refused == 1 else 'are'}"
    return f"{_waits(pool)}can be given work: {are} connected with versions that do not fit"


def says_waits(text: str, pool: str) -> bool:
    """Whether this is what `waits_text` says of a pool, for whatever reason."""
    return text.startswith(_waits(pool))


def _waits(pool: str) -> str:
    return f"no worker of the pool {pool} "


def joined_text(pool: str) -> str:
    """Return what the job's story says when it need not wait any longer."""
    return f"a worker of the pool {pool} is connected"


class PoolView(NamedTuple):
    """A pool as a job sees it. ``waiting_since``: since when it has been asked for and has had no worker."""

    name: str
    workers: int = 0
    slots: int = 0
    running: int = 0
    waiting_since: float | None = None


class Pools:
    """The workers that are connected, by pool.

    Parameters
    ----------
    asked
        As the study says; none: it runs everywhere.
    waited
        Pools of which the job's story says already that they have no worker, and for how many seconds that is so.
    """

    def __init__(
        self,
        asked: tuple[str, ...],
        course: Course,
        outbox: Outbox,
        *,
        aliases: Aliases = NO_ALIASES,
        waited: Mapping[str, float] | None = None,
    ) -> None:
        self._asked = {aliases.canonical(name): name for name in asked}
        self._aliases, self._course, self._outbox = aliases, course, outbox
        self._waited = {n: s for n, s in (waited or {}).items() if n in self._asked.values()}
        self._told = set(self._waited)
        self._since: dict[str, float] = {}
        self._groups: dict[str, str] = {}  # of every worker that ever came
        self._slots: dict[str, dict[str, int]] = {name: {} for name in self._asked.values()}
        self._n_refused: Counter[str] = Counter()

    def begin(self, now: float) -> None:
        """Note that from now on workers are waited for; those there are come as all others do."""
        for name in self._asked.values():
            self._since[name] = now - self._waited.get(name, 0.0)
        self._set_timer(now)

    def join(self, event: WorkerJoined, now: float) -> bool:
        """Note a worker, or its new number of slots; return whether the job may use it."""
        group = self._group((event.pool, *event.labels))
        if group is None:
            return False
        self._groups[event.worker] = group
        slots = self._slots.setdefault(group, {})
        if event.slots:
            slots[event.worker] = event.slots
        else:  # it is about to leave
            slots.pop(event.worker, None)
        self._look(group, now)
        return True

    def refused(self, names: tuple[tuple[str, ...], ...]) -> None:
        """Note which workers, by their names, are connected and get no work."""
        self._n_refused = Counter(group for each in names if (group := self._group(each)) is not None)

    def leave(self, worker: str, now: float) -> None:
        """Note that a worker is gone."""
        group = self._groups.get(worker)
        if group is not None and self._slots[group].pop(worker, None) is not None:
            self._look(group, now)

    def of(self, worker: str) -> str | None:
        """Return the pool of a worker that is or was connected; None: it is in none."""
        return self._groups.get(worker) or None

    def look(self, now: float) -> None:
        """Let the job's story say which pools have had no worker for a while."""
        if self._course.is_ending:
            return
        for name, since in self._since.items():
            if name not in self._told and now >= since + PATIENCE_S:
                self._told.add(name)
                self._outbox.write(c.Note(WAITS, waits_text(name, self._n_refused[name])))
        self._set_timer(now)

    def views(self, running: Mapping[str, int]) -> tuple[PoolView, ...]:
        """Return those asked for, in that order, or else those with workers. ``running``: replicates by worker."""
        return tuple(
            PoolView(
                name,
                len(slots),
                sum(slots.values()),
                sum(n for worker, n in running.items() if self._groups.get(worker) == name),
                None if self._course.is_ending else self._since.get(name),
            )
            for name, slots in self._slots.items()
            if name and (slots or name in self._asked.values())
        )

    def _group(self, names: tuple[str, ...]) -> str | None:
        """Return what a worker counts for that can be asked for by these: its pool, then its labels."""
        if not self._asked:
            return self._aliases.canonical(names[0]) if names and names[0] else ""
        meant = {self._aliases.canonical(name) for name in names if name}
        return next((name for form, name in self._asked.items() if form in meant), None)

    def _look(self, group: str, now: float) -> None:
        if group not in self._asked.values():
            return
        if self._slots[group]:
            self._since.pop(group, None)
            if group in self._told:
                self._told.discard(group)
                if not self._course.is_ending:
                    self._outbox.write(c.Note(JOINED, joined_text(group)))
        elif group not in self._since:
            self._since[group] = now
            self._set_timer(now)

    def _set_timer(self, now: float) -> None:
        untold = [since for name, since in self._since.items() if name not in self._told]
        if untold and not self._course.is_ending:
            self._outbox.set_timer("pools", max(now, min(untold) + PATIENCE_S))
