"""Waiting for news of a job without holding a thread: however many wait, one look is taken for all of them."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from modelops.server.views import JobView

POLL_S: Final = 0.5
LONGEST_S: Final = 8.0


@dataclass
class _Watched:
    """A job that somebody waits for.

    ``next``: becomes what the next look finds, or the error it meets. ``n_for_end``: of those who wait, how many want
    to hear of nothing but its end.
    """

    next: asyncio.Future[JobView]
    loop: asyncio.AbstractEventLoop
    news: asyncio.Event = field(default_factory=asyncio.Event)
    n_waiting: int = 0
    n_for_end: int = 0
    looking: asyncio.Task[None] | None = field(default=None)


class Waiting:
    """Those who wait, by job.

    Parameters
    ----------
    look
        Returns a job as it is now. What other servers and drivers did is seen at the next look, so at most
        ``poll_s`` late; of what happens here `poke` tells.
    goes_on
        Says whether a job is driven here and has not ended, so that `poke` will tell of its end: then whoever waits
        for that needs no look before.
    longest_s
        Nobody waits longer, whatever is asked for: clients and what stands between have time limits of their own, and
        asking again costs little.
    """

    def __init__(
        self,
        look: Callable[[str], Awaitable[JobView]],
        poll_s: float = POLL_S,
        longest_s: float = LONGEST_S,
        goes_on: Callable[[str], bool] = lambda _job: False,
    ) -> None:
        self._look, self._poll_s, self._longest_s, self._goes_on = look, poll_s, longest_s, goes_on
        self._watched: dict[str, _Watched] = {}

    def poke(self, job: str, ended: bool = True) -> None:
        """Look at a job now, if anybody waits for this: it has changed, or even ended. From any thread."""
        watched = self._watched.get(job)
        if watched is not None and (ended or watched.n_waiting > watched.n_for_end):
            with contextlib.suppress(RuntimeError):  # the server ends, and its loop is closed
                watched.loop.call_soon_threadsafe(watched.news.set)

    async def until(
        self, job: str, enough: Callable[[JobView], bool], wait_s: float, *, for_end: bool = False
    ) -> JobView:
        """Return the job as soon as it is as wanted, or after ``wait_s`` at most as it then is.

        ``for_end``: it is never as wanted before it has ended.

        Raises
        ------
        ModelOpsError
            It cannot be looked at.
        """
        if wait_s <= 0:
            return await self._look(job)
        watched = self._join(job, for_end)
        try:
            coming = watched.next  # of what is found from now on, nothing is missed
            view = None if for_end and self._goes_on(job) else await self._look(job)
            async with asyncio.timeout(min(wait_s, self._longest_s)):
                while view is None or not enough(view):
                    view = await asyncio.shield(coming)
                    coming = watched.next
        except TimeoutError:
            pass
        finally:
            self._leave(job, watched, for_end)
        return await self._look(job) if view is None else view

    def _join(self, job: str, for_end: bool) -> _Watched:
        watched = self._watched.get(job)
        if watched is None:
            loop = asyncio.get_running_loop()
            watched = self._watched[job] = _Watched(loop.create_future(), loop)
            watched.looking = asyncio.create_task(self._look_on(job, watched))
        watched.n_waiting += 1
        watched.n_for_end += for_end
        return watched

    def _leave(self, job: str, watched: _Watched, for_end: bool) -> None:
        watched.n_waiting -= 1
        watched.n_for_end -= for_end
        if not watched.n_waiting and watched.looking is not None:
            watched.looking.cancel()
            if self._watched.get(job) is watched:
                del self._watched[job]

    async def _look_on(self, job: str, watched: _Watched) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(watched.news.wait(), self._poll_s)
            watched.news.clear()
            found, watched.next = watched.next, asyncio.get_running_loop().create_future()
            try:
                found.set_result(await self._look(job))
            except Exception as error:  # noqa: BLE001  whoever waits is told, and no look follows
                del self._watched[job]
                found.set_exception(error)
                return
