"""Whether the bundle that a job was submitted from is still what the job runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from modelops.bundles import bundle_digest
from modelops.errors import BundleError
from modelops.who import whoami

if TYPE_CHECKING:
    from modelops.client.job import Job

_FROM = re.compile(r"submitted from (/.*)")


def bundle_changed_since(job: Job) -> str:
    """Return a sentence if the bundle was changed since the job was submitted from this machine, else nothing.

    A job runs the snapshot that was taken then, also when it is resumed or extended.
    """
    first = next(iter(job.events()), None)
    found = _FROM.fullmatch(first.text) if first is not None else None
    if first is None or found is None or first.who != whoami():
        return ""
    try:
        if not Path(found[1]).exists():
            return ""
        same = bundle_digest(Path(found[1])) == job.spec.bundle
    except BundleError:  # it can no longer be a bundle at all
        same = False
    except OSError as error:  # whatever was asked for has been done
        return (
            f"whether the bundle {found[1]} has changed since this job was submitted cannot be seen: {error}"
        )
    if same:
        return ""
    return (
        f"the bundle {found[1]} has changed since this job was submitted; the job goes on with the bundle it was "
        "submitted with. To run the changed one, submit it as a new job"
    )
