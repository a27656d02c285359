"""Jobs read directly from the store of this machine: the source of runs that need no server."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Any

from modelops.client.status import JobEventRecord, JobFile, JobFiles, JobStatus, PoolStatus, in_order
from modelops.errors import IntegrityError, NotFoundError
from modelops.study.ids import BundleDigest, JobId

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import pyarrow as pa

    from modelops.client.source import JobSource
    from modelops.home import Home
    from modelops.store import Objects, Records
    from modelops.store.contents import JobContents
    from modelops.store.parameters import ParameterSet
    from modelops.study.spec import JobSpec

POLL_S = 0.5
log = logging.getLogger(__name__)


class StoredSource:
    """The jobs of one home. What a job is to do next (cancel, resume, extend) its server decides, not this."""

    def __init__(self, home: Home) -> None:
        self.home = home

    @contextlib.contextmanager
    def _records(self) -> Iterator[Records]:
        from modelops.store import Records

        with contextlib.closing(Records.open(self.home.database_url)) as records:
            yield records

    @cached_property
    def _objects(self) -> Objects:
        from modelops.store import Objects

        return Objects.open(self.home.storage)

    def _contents(self, job: JobId) -> JobContents:
        from modelops.store.contents import JobContents

        with self._records() as records:
            return JobContents.of(self._objects, records, job)

    def status(self, job: JobId) -> JobStatus:
        """Return what the records say."""
        from modelops.store.contents import rest_of
        from modelops.store.overview import picture
        from modelops.study.spec import read_or_why

        with self._records() as records:
            row, counts = records.job(job), records.counts(job)
            aggregates = [ref.counts for ref in records.aggregates(job)]
            pools = picture(records, job).pools
        by_status = {str(status): n for status, n in counts.items() if n}
        asked: tuple[str, ...] = ()
        spec, why = read_or_why(row.spec)
        if spec is not None:  # else what is committed is all that is known
            asked = spec.asked_pools
            if left := spec.line.size - sum(by_status.values()):
                by_status[str(rest_of(row.state))] = left
        return JobStatus(
            state=row.state,
            counts=in_order(by_status),
            aggregates=in_order(sum(map(Counter, aggregates), Counter())),
            reason="; ".join(filter(None, (row.reason, why))),
            stalled=row.stalled,
            pools=tuple(
                PoolStatus(name, name in asked, counts=in_order(pools.get(name, {})))
                for name in dict.fromkeys((*asked, *pools))
            ),
        )

    def wait_for_change(self, job: JobId, since: JobStatus | None, wait_s: float) -> JobStatus:
        """Look again and again until something differs."""
        deadline = time.monotonic() + wait_s
        while True:
            status = self.status(job)
            left = deadline - time.monotonic()
            if status != since or left <= 0:
                return status
            time.sleep(min(POLL_S, left))

    def wait_for_end(self, job: JobId, wait_s: float) -> JobStatus:
        """Look again and again until it has ended."""
        deadline = time.monotonic() + wait_s
        while True:
            status = self.status(job)
            left = deadline - time.monotonic()
            if status.final or left <= 0:
                return status
            time.sleep(min(POLL_S, left))

    def spec(self, job: JobId) -> JobSpec:
        """Return the record of what the job is."""
        from modelops.study.spec import recorded_spec

        with self._records() as records:
            return recorded_spec(records.job(job).spec, job)

    def parameter_set(self, job: JobId, param: int | str) -> ParameterSet:
        """Return one parameter set."""
        parameters = self._contents(job).parameters
        try:
            return parameters[parameters.param_of(param) if isinstance(param, str) else param]
        except (KeyError, IndexError):
            raise NotFoundError(f"job {job} has no parameter set {param}") from None

    def lock(self, job: JobId) -> str:
        """Return the lock that the job's environment was made from."""
        from modelops.store.segments import job_folder

        return self._objects.get(f"{job_folder(job)}/lock").decode()

    def snapshot(self, job: JobId) -> Path:
        """Return the job's bundle, unpacked from storage if need be."""
        from modelops.store.fetch import fetch_snapshot

        return fetch_snapshot(self._objects, BundleDigest(self.spec(job).bundle), self.home.cache / "bundles")

    def events(self, job: JobId, after: int = 0) -> list[JobEventRecord]:
        """Return the job's story."""
        with self._records() as records:
            return [JobEventRecord(x.at, x.who, x.kind, x.text, x.number) for x in records.events(job, after)]

    def table(self, job: JobId, name: str) -> pa.Table:
        """Return a table, computed from committed segments; what is damaged is left out, with a warning.

        Only a server repairs, so here its replicates are what they will be then: not run.
        """
        from modelops.store import aggregate_failures, failures, results
        from modelops.store.whole import without_damage

        tables = {
            "replicates": results.replicates_table,
            "aggregates": results.aggregates_table,
            "attempts": results.attempts_table,
            "failures": failures.failures_table,
            "aggregate_failures": aggregate_failures.aggregate_failures,
        }
        contents = self._contents(job)
        try:
            return tables[name](contents)
        except (IntegrityError, NotFoundError):
            whole, damage = without_damage(contents)
            if not damage:
                raise
            more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
            log.warning(
                "job %s is shown without what is damaged: %s%s; 'modelops jobs reconcile %s' repairs it",
                job, damage[0], more, job,
            )  # fmt: skip
            return tables[name](whole)

    def output(self, job: JobId, param: int | str, replicate: int, name: str | None) -> Any:
        """Return what the model returned."""
        with _found():
            return self._contents(job).output(param, replicate, name)

    def aggregate(self, job: JobId, param: int | str, target: str) -> Any:
        """Return what the aggregate returned."""
        from modelops.store.aggregate_value import aggregate_value

        with _found():
            return aggregate_value(self._contents(job), param, target)

    def log(self, job: JobId, param: int | str | None, replicate: int | None) -> str:
        """Return what the bundle printed."""
        from modelops.store.job_log import read_log

        return read_log(self._contents(job), param, replicate)

    def files(self, job: JobId) -> JobFiles:
        """List what the server would list."""
        from modelops.server import copying

        with self._records() as records:
            page = copying.JobFiles(records, self._objects).page(job, "", sys.maxsize, math.inf)
        return JobFiles(tuple(JobFile(f.name, f.n_bytes, f.sha256) for f in page.files), page.final)

    def pieces(self, job: JobId, file: JobFile, offset: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file."""
        from modelops.store.segments import job_folder

        for piece in self._objects.stream(f"{job_folder(job)}/{file.name}"):
            yield piece[offset:]
            offset = max(0, offset - len(piece))

    def result_paths(self, job: JobId) -> dict[str, Path]:
        """Return where the result files lie."""
        from modelops.store.segments import job_folder

        folder = f"{job_folder(job)}/results"
        paths = {
            name.removeprefix(f"{folder}/"): self._objects.local_path(name)
            for name in self._objects.list(folder)
        }
        return {name: path for name, path in paths.items() if path is not None}

    def cancel(self, job: JobId, *, at_once: bool = False) -> None:
        """Hand the request to the server of this home."""
        self._served().cancel(job, at_once=at_once)

    def resume(self, job: JobId, *, failed: bool) -> None:
        """Hand the request to the server of this home."""
        self._served().resume(job, failed=failed)

    def extend(
        self, job: JobId, replicates: int | None, parameters: Sequence[bytes], seeds: Sequence[int] | None
    ) -> None:
        """Hand the request to the server of this home."""
        self._served().extend(job, replicates, parameters, seeds)

    def _served(self) -> JobSource:
        from modelops.client.server import served_at

        return served_at(self.home)


@contextlib.contextmanager
def _found() -> Iterator[None]:
    """Tell a caller who names what is not there so in a sentence."""
    try:
        yield
    except KeyError as error:
        raise NotFoundError(error.args[0] if error.args else str(error)) from error
