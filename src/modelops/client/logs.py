"""What the bundle of a job prints, as it becomes known."""

from __future__ import annotations

import re
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelops.client.following import Following

LOOK_S: Final = 25.0
PAUSE_S: Final = 1.0  # at least, between two readings of the whole log
TIMES_READING: Final = 9.0  # and so many times what a reading took, however long the log has become
_HEADING: Final = re.compile(r"^(?=--- )", re.MULTILINE)


def new_text(
    following: Following,
    param: int | str | None,
    replicate: int | None,
    *,
    follow: bool,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[str]:
    """Yield what was printed and, if asked to follow, what comes until the job has ended.

    The log is in the order of the replicates and not of time, so what is new may stand anywhere in it: sections that
    were not seen before are yielded. Who follows waits for a server that is away.
    """
    job = following.job
    if not follow:
        yield job.log(param, replicate)
        return

    def read() -> tuple[str, float]:
        began = clock()
        return job.log(param, replicate), clock() - began

    seen: Counter[str] = Counter()
    while True:
        status = following.look(LOOK_S)
        if status.unknown_since is not None:
            continue
        text, took_s = following.ask(read)
        now = Counter(_HEADING.split(text))
        fresh = now - seen
        yield "".join(section * n for section, n in fresh.items())
        seen = now
        if status.final:  # it was when the log was read: nothing comes any more
            return
        following.rest(max(PAUSE_S, TIMES_READING * took_s))
