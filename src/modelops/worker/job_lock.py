"""Read the lock of a job from storage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelops.environments import NotALockError, parse_lock
from modelops.errors import IntegrityError
from modelops.store.segments import job_folder

if TYPE_CHECKING:
    from modelops.environments import Lock
    from modelops.store import Objects
    from modelops.study.ids import JobId


def read_lock(objects: Objects, job: JobId) -> Lock:
    """Return what a job's environment is made from.

    Raises
    ------
    NotFoundError
        The job was never prepared, or the object is gone.
    IntegrityError
        It is damaged.
    """
    name = f"{job_folder(job)}/lock"
    try:
        return parse_lock(objects.get(name).decode())
    except (NotALockError, UnicodeDecodeError) as error:
        raise IntegrityError(
            f"{name} is damaged: {error}; put it back from a backup, or submit the study again"
        ) from error
