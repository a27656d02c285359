"""What a modeler holds: take a study, hand back a `Job` and its results."""

from modelops.client.job import Job, JobStatus
from modelops.client.run import local_cluster, run

__all__ = ["Job", "JobStatus", "local_cluster", "run"]
