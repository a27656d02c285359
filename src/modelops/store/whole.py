"""What is left of a job's contents without stored objects that are damaged or gone; changes nothing."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from modelops.errors import IntegrityError, NotFoundError
from modelops.store.segment_table import open_execution, read_aggregates
from modelops.store.segments import job_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelops.store.contents import JobContents
    from modelops.worker.messages import SegmentRef


def without_damage(contents: JobContents) -> tuple[JobContents, list[str]]:
    """Return the contents without what cannot be read, as if it had no record, and what is wrong with each of that."""
    said: list[str] = []
    segments = [
        _with_execution(contents, ref, said)
        for number, ref in enumerate(contents.segments)
        if _is_whole(partial(contents.read, number), said)
    ]
    aggregates = [
        ref
        for ref in contents.aggregates
        if _is_whole(partial(read_aggregates, contents.objects, contents.job, ref), said)
    ]
    whole = dataclasses.replace(contents, segments=segments, aggregates=aggregates)
    if (bare := whole.without_parameters()) is not None:
        said.append(bare.lost_parameters)
        return bare, said
    return whole, said


def _with_execution(contents: JobContents, ref: SegmentRef, said: list[str]) -> SegmentRef:
    if ref.execution is None:
        return ref
    name = f"{job_folder(contents.job)}/{ref.execution}"
    if _is_whole(lambda: open_execution(contents.objects.get(name), name), said):
        return ref
    return msgspec.structs.replace(ref, execution=None)


def _is_whole(read: Callable[[], object], said: list[str]) -> bool:
    try:
        read()
    except (IntegrityError, NotFoundError) as error:
        said.append(str(error))
        return False
    return True
