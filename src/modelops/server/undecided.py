"""Read again what a job's driver with ``until`` goes by: the watched output of parameter sets that are undecided."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from modelops.driver.needs import open_params
from modelops.states import ReplicateStatus
from modelops.store import read_segment
from modelops.store.watched import watched_in
from modelops.study.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelops.store import Objects
    from modelops.study.ids import JobId
    from modelops.study.spec import JobSpec
    from modelops.worker.messages import SegmentRef


def with_watched(
    objects: Objects, job: JobId, spec: JobSpec, segments: Sequence[SegmentRef]
) -> list[SegmentRef]:
    """Return the segments that count, with what is watched of those that something is still to be decided by.

    Raises
    ------
    IntegrityError, NotFoundError
        One of these is damaged or gone.
    """
    if spec.until is None:
        return list(segments)
    undecided = Ranges(
        pair
        for lo, hi in open_params(spec.line, segments).pairs
        for pair in spec.line.of_params(lo, hi).pairs
    )
    out = []
    for ref in segments:
        if ReplicateStatus.NOT_NEEDED in ref.counts or undecided.isdisjoint(Ranges(ref.ranges)):
            out.append(ref)
            continue
        watched, no_numbers = watched_in(read_segment(objects, job, ref), spec.until.of)
        out.append(replace(ref, watched=watched, no_numbers=no_numbers))
    return out
