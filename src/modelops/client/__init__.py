"""What a modeler holds: take a study, hand back a `Job` and its results."""

from modelops.client.client import Client, submit
from modelops.client.job import Job, JobStatus
from modelops.client.run import local_cluster, run

__all__ = ["Client", "Job", "JobStatus", "local_cluster", "run", "submit"]
