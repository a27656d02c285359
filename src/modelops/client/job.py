"""A job as its modeler holds it: status and results, read from what is committed."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from modelops.errors import RequestError
from modelops.home import Home
from modelops.states import FINAL_JOB_STATES, JobState
from modelops.study.ids import BundleDigest, JobId

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pyarrow as pa

    from modelops.bundles import Manifest
    from modelops.store import JobView
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
    def _view(self) -> Iterator[JobView]:
        from modelops.store import JobView, Objects, Records

        with contextlib.closing(Records.open(self.home.database_url)) as records:
            yield JobView(records, Objects.open(str(self.home.objects)), self.id)

    def status(self) -> JobStatus:
        """Return the state, the counts by replicate status, the aggregates, and the reason of the state."""
        with self._view() as view:
            return JobStatus(
                state=view.row.state,
                counts={str(k): v for k, v in view.counts().items()},
                aggregates=view.aggregate_counts(),
                reason=view.row.reason,
            )

    def results(self) -> pa.Table:
        """Return one row per replicate, sorted by (parameter set, replicate).

        Columns: ``param`` (ordinal), ``param_id``, ``replicate``, ``seed``, ``status``, the parameters, then every
        scalar output whose values all have one type. What was left out, and why, is in the table's schema metadata
        under ``modelops.left_out``. Answers also while the job runs.
        """
        with self._view() as view:
            return view.replicates_table()

    def aggregates(self) -> pa.Table:
        """Return one row per parameter set: parameters, status, how many replicates, scalar outputs."""
        with self._view() as view:
            return view.aggregates_table()

    def failures(self) -> pa.Table:
        """Return one row per replicate that did not succeed, with its error, traceback and last stderr."""
        with self._view() as view:
            return view.failures_table()

    def failure_summary(self) -> list[dict[str, Any]]:
        """Return one entry per fingerprint (type and place): count, statuses, one full example, how to run it again."""
        with self._view() as view:
            return view.failure_summary()

    def attempts(self) -> pa.Table:
        """Return durations, attempts, workers and hosts: what depends on where and when the job ran."""
        with self._view() as view:
            return view.attempts_table()

    def events(self) -> list[JobEventRecord]:
        """Return the job's story: who changed what, when and why, oldest first."""
        with self._view() as view:
            return [JobEventRecord(x.at, x.who, x.kind, x.text) for x in view.events()]

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
        with self._view() as view:
            return view.output(param, replicate, name)

    def aggregate(self, param: int | str, target: str | None = None) -> Any:
        """Return an aggregate of one parameter set exactly as the bundle returned it.

        ``target`` names the aggregate entry point; it may be left out when the job has one. Raises NotFoundError
        if it was skipped or failed; the message says why.
        """
        with self._view() as view:
            return view.aggregate(param, target)

    def log(self, param: int | str | None = None, replicate: int | None = None) -> str:
        """Return what the bundle printed: of one replicate, one parameter set, or the whole job."""
        with self._view() as view:
            return view.log(param, replicate)

    def result_files(self) -> dict[str, Path]:
        """Return the paths of the result files by name. Raises RequestError while the job is not final."""
        with self._view() as view:
            if view.row.state not in FINAL_JOB_STATES:
                raise RequestError(f"job {self.id} is {view.row.state}; its result files are written when it ends")
            return view.result_files()

    @cached_property
    def spec(self) -> JobSpec:
        """The frozen record of what the job is."""
        with self._view() as view:
            return view.spec

    @cached_property
    def manifest(self) -> Manifest:
        """What the job's bundle says of itself."""
        from modelops.bundles import load_manifest

        return load_manifest(self.snapshot())

    def snapshot(self) -> Path:
        """Return the read-only folder that holds the job's bundle, unpacking it if need be."""
        from modelops.store import Objects
        from modelops.store.fetch import fetch_snapshot

        objects = Objects.open(str(self.home.objects))
        return fetch_snapshot(objects, BundleDigest(self.spec.bundle), self.home.cache / "bundles")

    def params(self, param: int) -> dict[str, Any]:
        """Return one parameter set, by its ordinal."""
        with self._view() as view:
            return view.params(param)


@dataclass(frozen=True)
class JobEventRecord:
    """One line of a job's story."""

    at: datetime
    who: str
    kind: str
    text: str
