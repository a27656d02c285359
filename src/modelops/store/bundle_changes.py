"""What workers say of a bundle whose files were changed beside them: what ran meanwhile may have read anything.

A worker says so before it stores what ran, so no outcome that counts can come from a changed bundle unnoticed.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import msgspec

from modelops.store.objects import AlreadyExistsError
from modelops.store.segments import job_folder
from modelops.study.ids import AttemptId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelops.store.objects import Objects
    from modelops.study.ids import JobId


def say_changed(objects: Objects, job: JobId, attempt: AttemptId, changes: Sequence[str]) -> None:
    """Say of an attempt that the bundle was changed while it ran, in one line for each path."""
    with contextlib.suppress(AlreadyExistsError):
        objects.put_new(f"{_folder(job)}/{attempt}", msgspec.json.encode(changes))


def said_changed(objects: Objects, job: JobId) -> dict[AttemptId, list[str]]:
    """Return what was said of a job's attempts, also of earlier runs."""
    names = sorted(objects.list(_folder(job)))
    return {
        AttemptId(name.rpartition("/")[2]): msgspec.json.decode(objects.get(name), type=list[str])
        for name in names
    }


def _folder(job: JobId) -> str:
    return f"{job_folder(job)}/changed"
