"""Where a `Job` gets what it shows: the store of this machine (`stored`), or a server over HTTP (`served`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import pyarrow as pa

    from modelops.client.status import JobEventRecord, JobFile, JobFiles, JobStatus
    from modelops.home import Home
    from modelops.store.parameters import ParameterSet
    from modelops.study.ids import JobId
    from modelops.study.spec import JobSpec


class JobSource(Protocol):
    """Everything that can be asked about a job, and of it. Every answer is what is true now.

    What does not exist is a `NotFoundError`, what the job's state does not allow a `RequestError`, a server that
    does not answer a `ServerUnreachableError`.
    """

    home: Home

    def status(self, job: JobId) -> JobStatus:
        """Return what is known of a job. Does not raise because a server is away: that is `unknown`."""

    def wait_for_change(self, job: JobId, since: JobStatus | None, wait_s: float) -> JobStatus:
        """Return the status as soon as it differs from ``since``, or after about ``wait_s``."""

    def wait_for_end(self, job: JobId, wait_s: float) -> JobStatus:
        """Return the status as soon as it is final, or after about ``wait_s`` at most as it then is."""

    def spec(self, job: JobId) -> JobSpec:
        """Return the frozen record of what the job is."""

    def parameter_set(self, job: JobId, param: int | str) -> ParameterSet:
        """Return a parameter set by its ordinal or its ``param_id``."""

    def lock(self, job: JobId) -> str:
        """Return the lock of the job's environment."""

    def snapshot(self, job: JobId) -> Path:
        """Return the read-only folder with the job's bundle on this machine."""

    def events(self, job: JobId, after: int = 0) -> list[JobEventRecord]:
        """Return the events with a number above ``after``, oldest first."""

    def table(self, job: JobId, name: str) -> pa.Table:
        """Return ``replicates``, ``aggregates``, ``failures``, ``aggregate_failures`` or ``attempts``."""

    def output(self, job: JobId, param: int | str, replicate: int, name: str | None) -> Any:
        """Return one output, or all as the model returned them."""

    def aggregate(self, job: JobId, param: int | str, target: str) -> Any:
        """Return one aggregate as the bundle returned it."""

    def log(self, job: JobId, param: int | str | None, replicate: int | None) -> str:
        """Return what the bundle printed."""

    def files(self, job: JobId) -> JobFiles:
        """List the committed segments with their packs and, once the job has ended, the result files."""

    def pieces(self, job: JobId, file: JobFile, offset: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a listed file from an offset on, not yet verified."""

    def result_paths(self, job: JobId) -> dict[str, Path]:
        """Return the paths on this machine of the result files of a job that has ended."""

    def cancel(self, job: JobId, *, at_once: bool = False) -> None:
        """Ask for the job's end."""

    def resume(self, job: JobId, *, failed: bool) -> None:
        """Let a job that has ended run what is missing and, if asked, what failed."""

    def extend(
        self, job: JobId, replicates: int | None, parameters: Sequence[bytes], seeds: Sequence[int] | None
    ) -> None:
        """Add replicates (the new number for each set) or canonical parameter sets to a job that has ended."""
