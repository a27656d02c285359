"""Run a bundle's code on this machine without Dask: reports, checks, and ``modelops bundle run``."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from modelops.bundles import load_manifest, take_snapshot
from modelops.environments import Environments, parse_lock
from modelops.home import make_private
from modelops.processes import ProcessPool, RunnerSpec
from modelops.study.ids import BundleDigest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from modelops.bundles import Manifest
    from modelops.client.job import Job
    from modelops.environments import Environment
    from modelops.home import Home
    from modelops.processes import ContextDesk, LogSink, Outcome, ReplicateSet
    from modelops.study.spec import Limits


class LocalRunner:
    """A bundle with its environment and a process pool of one slot, for the length of a ``with`` block.

    ``root``: a folder that exists for as long.
    """

    def __init__(
        self, snapshot: Path, digest: BundleDigest, manifest: Manifest, environment: Environment, home: Home
    ) -> None:
        self.snapshot, self.digest, self.manifest, self.environment = snapshot, digest, manifest, environment
        self._home = home
        self._stack = contextlib.ExitStack()
        self.root: Path
        self.pool: ProcessPool

    @classmethod
    def of_bundle(
        cls,
        source: Path,
        home: Home,
        *,
        upgrade: bool = False,
        on_progress: Callable[[str], None] | None = None,
    ) -> Self:
        """Snapshot a bundle and make its environment ready.

        Raises
        ------
        ModelOpsError
            The bundle is wrong or its environment cannot be had.
        """
        load_manifest(source)  # what is no bundle is not copied: it may be large
        digest, snapshot = take_snapshot(source, home.cache / "bundles")
        manifest = load_manifest(snapshot)
        environments = Environments(home.cache)
        lock = environments.resolve(snapshot, upgrade=upgrade, on_progress=on_progress)
        environment = environments.ensure(lock, bundle_root=snapshot, on_progress=on_progress)
        return cls(snapshot, digest, manifest, environment, home)

    @classmethod
    def of_job(cls, job: Job, *, on_progress: Callable[[str], None] | None = None) -> Self:
        """Use the bundle and the environment of a job."""
        home, manifest = job.home, job.manifest
        lock = parse_lock(job.source.lock(job.id))
        snapshot = job.snapshot()
        environment = Environments(home.cache).ensure(lock, bundle_root=snapshot, on_progress=on_progress)
        return cls(snapshot, BundleDigest(job.spec.bundle), manifest, environment, home)

    def spec(self, *, isolation: str | None = None, limits: Limits | None = None) -> RunnerSpec:
        """Return what the pool needs to start a runner of this bundle; isolation as the bundle says."""
        return RunnerSpec(
            python=str(self.environment.python),
            environment_key=self.environment.key,
            environment_dir=str(self.environment.path),
            bundle_digest=self.digest,
            snapshot=str(self.snapshot),
            isolation=isolation or self.manifest.isolation,
            memory_bytes=limits.memory_bytes if limits else None,
            replicate_timeout_s=limits.replicate_timeout_s if limits else None,
            threads=limits.threads if limits else 1,
            wire=self.manifest.wire is not None,
            pycache=str(self._home.cache / "pycache" / self.environment.key),
        )

    def call(self, entry: str, args: Sequence[Any], *, spec: RunnerSpec | None = None) -> Any:
        """Call a function of the bundle in its environment and return its value."""
        return self.pool.call(spec or self.spec(), entry, args)

    def replicates(
        self,
        spec: RunnerSpec,
        entry: str,
        sets: Sequence[ReplicateSet],
        *,
        log: LogSink | None = None,
        desk: ContextDesk | None = None,
    ) -> list[Outcome]:
        """Run replicates one after another and return their outcomes, in the order of ``sets``."""
        outcomes: list[Outcome] = []
        self.pool.run(spec, entry, sets, on_outcome=outcomes.append, log=log, desk=desk)
        return outcomes

    def start_afresh(self) -> None:
        """End the processes, so that the next call gets a new one."""
        self.pool.close()
        self.pool = self._stack.enter_context(contextlib.closing(ProcessPool(self.root, slots=1)))

    def __enter__(self) -> Self:
        make_private(self._home.state)
        folder = tempfile.TemporaryDirectory(prefix="local-", dir=self._home.state)
        self.root = Path(self._stack.enter_context(folder))
        self.pool = self._stack.enter_context(contextlib.closing(ProcessPool(self.root, slots=1)))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
