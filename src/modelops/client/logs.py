"""What the bundle of a job prints, as it becomes known."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelops.client.job import Job

LOOK_S: Final = 25.0
_HEADING: Final = re.compile(r"^(?=--- )", re.MULTILINE)


def new_text(job: Job, param: int | str | None, replicate: int | None, *, follow: bool) -> Iterator[str]:
    """Yield what was printed and, if asked to follow, what comes until the job has ended.

    The log is in the order of the replicates and not of time, so what is new may stand anywhere in it: sections that
    were not seen before are yielded.
    """
    seen: Counter[str] = Counter()
    while True:
        status = job.status()
        now = Counter(_HEADING.split(job.log(param, replicate)))
        fresh = now - seen
        yield "".join(section * n for section, n in fresh.items())
        seen = now
        if not follow or status.final:
            return
        job.source.wait_for_change(job.id, status, LOOK_S)
