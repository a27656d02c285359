"""A job as its modeler holds it: status and results, read from what is committed."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from modelops.errors import NotFoundError, RequestError
from modelops.home import Home
from modelops.states import FINAL_JOB_STATES, JobState
from modelops.study.ids import BundleDigest, JobId

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from pathlib import Path

    import pyarrow as pa

    from modelops.bundles import Manifest
    from modelops.store import Objects, Records
    from modelops.store.contents import JobContents
    from modelops.study.spec import JobSpec


@dataclass(frozen=True)
class JobStatus:
    """What is known of a job now.

    ``counts``: replicate status -> number; they add up to the number of replicates. ``aggregates``: aggregate
    status -> number. ``eta``: seconds left, None if unknown.
    """

    state: JobState
    counts: dict[str, int]
    aggregates: dict[str, int]
    reason: str
    eta: float | None = None

    @property
    def final(self) -> bool:
        """Whether the job has ended."""
        return self.state in FINAL_JOB_STATES


class Job:
    """One job. Cheap to make; every method reads what is true now.

    Parameters
    ----------
    id
        A job id.
    home
        Where the job is stored; default as for every command, see ``MODELOPS_HOME``.
    """

    def __init__(self, id: str, home: Home | None = None) -> None:  # noqa: A002  the word of the field
        self.id = JobId(id)
        self.home = home or Home.from_environ(os.environ)

    def __repr__(self) -> str:
        return f"<modelops.Job {self.id}>"

    @contextlib.contextmanager
    def _records(self) -> Iterator[Records]:
        from modelops.store import Records

        with contextlib.closing(Records.open(self.home.database_url)) as records:
            yield records

    def _contents(self) -> JobContents:
        from modelops.store.contents import JobContents

        with self._records() as records:
            return JobContents.of(self._objects, records, self.id)

    @cached_property
    def _objects(self) -> Objects:
        from modelops.store import Objects

        return Objects.open(str(self.home.objects))

    def status(self) -> JobStatus:
        """Return the state, the counts by replicate status, the aggregates, and the reason of the state."""
        with self._records() as records:
            row, counts = records.job(self.id), records.counts(self.id)
            aggregates = [ref.counts for ref in records.aggregates(self.id)]
        by_status = {str(status): n for status, n in counts.items() if n}
        left = self.spec.line.size - sum(by_status.values())
        if left:
            by_status[str(self._contents().rest)] = left
        return JobStatus(
            state=row.state,
            counts=by_status,
            aggregates={str(k): n for k, n in sum(map(Counter, aggregates), Counter()).items()},
            reason=row.reason,
        )

    def results(self) -> pa.Table:
        """Return one row per replicate, sorted by (parameter set, replicate).

        Columns: ``param`` (ordinal), ``param_id``, ``replicate``, ``seed``, ``status``, the parameters, then every
        scalar output whose values all have one type. What was left out, and why, is in the table's schema metadata
        under ``modelops.left_out``. Answers also while the job runs.
        """
        from modelops.store.results import replicates_table

        return replicates_table(self._contents())

    def aggregates(self) -> pa.Table:
        """Return one row per parameter set: parameters, status, how many replicates, scalar outputs."""
        from modelops.store.results import aggregates_table

        return aggregates_table(self._contents())

    def failures(self) -> pa.Table:
        """Return one row per replicate that did not succeed, with its error, traceback and last stderr."""
        from modelops.store.failures import failures_table

        return failures_table(self._contents())

    def failure_summary(self) -> pa.Table:
        """Return one row per fingerprint (type and place), the most frequent first.

        Each has its count, one full example with traceback and stderr, and the command that runs that replicate
        again on this machine. What did not run is not in it.
        """
        from modelops.store.failures import failure_summary

        return failure_summary(self.failures(), self._rerun_command)

    def _rerun_command(self, row: dict[str, Any]) -> str:
        return f"modelops bundle run --job {self.id} --param {row['param']} --replicate {row['replicate']}"

    def attempts(self) -> pa.Table:
        """Return durations, attempts, workers and hosts: what depends on where and when the job ran."""
        from modelops.store.results import attempts_table

        return attempts_table(self._contents())

    def events(self) -> list[JobEventRecord]:
        """Return the job's story: who changed what, when and why, oldest first."""
        with self._records() as records:
            return [JobEventRecord(x.at, x.who, x.kind, x.text) for x in records.events(self.id)]

    def output(self, param: int | str, replicate: int, name: str | None = None) -> Any:
        """Return an output exactly as the model returned it.

        Parameters
        ----------
        param
            Ordinal of the parameter set, or its ``param_id``.
        replicate
            Number of the replicate, from 0.
        name
            Name of the output; None: all outputs of the replicate, as a dict. A model that returned no dict has
            one output, named ``value``.

        Raises
        ------
        NotFoundError
            There is no such replicate, it has not succeeded (the message says its status), or no such output.
        """
        with _found():
            value = self._contents().output(param, replicate, name)
        return {"value": value} if name is None and not isinstance(value, dict) else value

    def aggregate(self, param: int | str, target: str | None = None) -> Any:
        """Return an aggregate of one parameter set exactly as the bundle returned it.

        ``target`` names the aggregate entry point; it may be left out when the job has one. Raises NotFoundError
        if it was skipped or failed; the message says why.
        """
        from modelops.store.aggregate_value import aggregate_value

        targets = self.spec.aggregates
        if target is None and len(targets) != 1:
            raise RequestError(
                f"job {self.id} has {len(targets)} aggregates; name one of {', '.join(targets) or 'none'}"
            )
        with _found():
            return aggregate_value(self._contents(), param, target or targets[0])

    def log(self, param: int | str | None = None, replicate: int | None = None) -> str:
        """Return what the bundle printed: of one replicate, one parameter set, or the whole job."""
        from modelops.client.job_log import read_log

        return read_log(self._contents(), param, replicate)

    def result_files(self) -> dict[str, Path]:
        """Return the paths of the result files by name. Raises RequestError while the job is not final."""
        state = self.status().state
        if state not in FINAL_JOB_STATES:
            raise RequestError(f"job {self.id} is {state}; its result files are written when it ends")
        folder = f"v1/jobs/{self.id}/results"
        paths = {
            name.removeprefix(f"{folder}/"): self._objects.local_path(name)
            for name in self._objects.list(folder)
        }
        return {name: path for name, path in paths.items() if path is not None}

    @cached_property
    def spec(self) -> JobSpec:
        """The frozen record of what the job is."""
        from modelops.study.spec import decode_spec

        with self._records() as records:
            return decode_spec(records.job(self.id).spec)

    @cached_property
    def manifest(self) -> Manifest:
        """What the job's bundle says of itself."""
        from modelops.bundles import load_manifest

        return load_manifest(self.snapshot())

    def snapshot(self) -> Path:
        """Return the read-only folder that holds the job's bundle, unpacking it if need be."""
        from modelops.store.fetch import fetch_snapshot

        return fetch_snapshot(self._objects, BundleDigest(self.spec.bundle), self.home.cache / "bundles")

    def params(self, param: int) -> dict[str, Any]:
        """Return one parameter set, by its ordinal."""
        return self._contents().parameters[param].values()


@contextlib.contextmanager
def _found() -> Iterator[None]:
    """Tell a caller who names what is not there so in a sentence."""
    try:
        yield
    except KeyError as error:
        raise NotFoundError(error.args[0] if error.args else str(error)) from error


@dataclass(frozen=True)
class JobEventRecord:
    """One line of a job's story."""

    at: datetime
    who: str
    kind: str
    text: str
