"""What the bundle of a job prints, as it becomes known."""

from __future__ import annotations

import re
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelops.client.job import Job

LOOK_S: Final = 25.0
PAUSE_S: Final = 1.0  # at least, between two readings of the whole log
TIMES_READING: Final = 9.0  # and so many times what a reading took, however long the log has become
_HEADING: Final = re.compile(r"^(?=--- )", re.MULTILINE)


def new_text(
    job: Job,
    param: int | str | None,
    replicate: int | None,
    *,
    follow: bool,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[str]:
    """Yield what was printed and, if asked to follow, what comes until the job has ended.

    The log is in the order of the replicates and not of time, so what is new may stand anywhere in it: sections that
    were not seen before are yielded.
    """
    seen: Counter[str] = Counter()
    while True:
        status, began = job.status(), clock()
        now = Counter(_HEADING.split(job.log(param, replicate)))
        took_s, fresh = clock() - began, now - seen
        yield "".join(section * n for section, n in fresh.items())
        seen = now
        if not follow or status.final:
            return
        sleep(max(PAUSE_S, TIMES_READING * took_s))
        job.source.wait_for_change(job.id, status, LOOK_S)
