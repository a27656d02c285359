"""What a worker knows of a job: its spec, its bundle's snapshot, its environment, its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from modelops.bundles import (
    Manifest,
    disown_snapshot,
    manifest_of_snapshot,
    snapshot_changed,
    snapshot_mark,
)
from modelops.errors import BundleEnvironmentError, IntegrityError
from modelops.processes import RunnerSpec
from modelops.store.fetch import fetch_snapshot
from modelops.store.parameters import Parameters
from modelops.store.segments import job_folder
from modelops.study.ids import BundleDigest
from modelops.study.spec import JobSpec, decode_spec
from modelops.worker.job_lock import read_lock
from modelops.worker.sets import replicate_sets
from modelops.worker.slow import SLOW_S, said_if_slow
from modelops.worker.topics import SLOW_TOPIC

if TYPE_CHECKING:
    from modelops.environments import Environment
    from modelops.processes import AnySet
    from modelops.study.ids import JobId
    from modelops.study.ranges import Ranges
    from modelops.worker.runtime import WorkerRuntime


@dataclass(frozen=True)
class JobContext:
    """Immutable; shared by the worker's threads."""

    job: JobId
    spec: JobSpec
    manifest: Manifest
    environment: Environment
    runner: RunnerSpec
    parameters: Parameters
    snapshot_mark: str

    @property
    def has_its_snapshot(self) -> bool:
        """Whether the bundle's folder is still the one that was there when this was loaded. Two microseconds."""
        return snapshot_mark(Path(self.runner.snapshot)) == self.snapshot_mark

    def snapshot_changes(self) -> list[str]:
        """Return how the bundle's folder differs from what it was; it is made anew then for what comes next."""
        snapshot = Path(self.runner.snapshot)
        if changes := snapshot_changed(snapshot):
            disown_snapshot(snapshot, self.snapshot_mark)
        return changes

    def sets(self, indices: Ranges) -> list[AnySet]:
        """Return the ``sets`` of a ``replicates/run`` request for these indices, in order of index."""
        return replicate_sets(self.spec, self.parameters, indices)


def load_job_context(runtime: WorkerRuntime, job: JobId, study: str, digest: str = "") -> JobContext:
    """Read the job's record from storage, and make its bundle and environment ready on this machine.

    ``study``: the object below the job's folder that holds its spec; ``digest``: its SHA-256, if that is known.

    Raises
    ------
    IntegrityError
        One of the objects is damaged.
    """
    objects, cache = runtime.objects, runtime.settings.cache
    name = f"{job_folder(job)}/{study}"
    data = objects.get(name)
    if digest and sha256(data).hexdigest() != digest:
        raise IntegrityError(f"{name} is damaged: it is not what was recorded")
    spec = decode_spec(data)
    lock = read_lock(objects, job)
    snapshot = fetch_snapshot(objects, BundleDigest(spec.bundle), cache / "bundles")
    mark = snapshot_mark(snapshot)
    # Before what takes long: somebody may clean the cache meanwhile.
    manifest = manifest_of_snapshot(snapshot)

    def say() -> None:
        needed = f"{runtime.host} has needed {SLOW_S:.0f} s for the environment until now"
        runtime.announce(
            SLOW_TOPIC, {"job": job, "text": f"{needed}; see whether it reaches the package index"}
        )

    try:
        with said_if_slow(say):
            environment = runtime.environments.ensure(lock, bundle_root=snapshot)
    except BundleEnvironmentError as error:
        error.add_note(f"on {runtime.host}")  # the driver knows this worker by its address
        raise
    runner = RunnerSpec(
        python=str(environment.python),
        environment_key=environment.key,
        environment_dir=str(environment.path),
        bundle_digest=spec.bundle,
        snapshot=str(snapshot),
        isolation=spec.isolation,
        memory_bytes=spec.limits.memory_bytes,
        replicate_timeout_s=spec.limits.replicate_timeout_s,
        threads=spec.limits.threads,
        wire=manifest.wire is not None,
        pycache=str(cache / "pycache" / environment.key),
        incarnation=f"{environment.mark} {mark}",
    )
    return JobContext(
        job, spec, manifest, environment, runner, Parameters(objects, job, spec.parameters), mark
    )
