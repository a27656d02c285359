"""What a modeler holds: take a study, hand back a `Job` and its results."""

from typing import TYPE_CHECKING

from modelops.lazily import imported_from

if TYPE_CHECKING:
    from modelops.client.client import Client, submit
    from modelops.client.job import Job
    from modelops.client.run import local_cluster
    from modelops.client.status import JobStatus

__all__ = ["Client", "Job", "JobStatus", "local_cluster", "submit"]

__getattr__ = imported_from(
    __name__,
    {
        "Client": "modelops.client.client",
        "Job": "modelops.client.job",
        "JobStatus": "modelops.client.status",
        "local_cluster": "modelops.client.run",
        "submit": "modelops.client.client",
    },
)
