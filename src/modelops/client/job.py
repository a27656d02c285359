"""A job as its modeler holds it: status and results, and what to do with it next."""

from __future__ import annotations

import json
import logging
import os
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.client.status import JobEventRecord, JobStatus
from modelops.client.stored import StoredSource
from modelops.errors import RequestError, ServerUnreachableError, WaitTimeoutError
from modelops.home import Home
from modelops.study.ids import JobId
from modelops.study.stopping import Until

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa

    from modelops.bundles import Manifest
    from modelops.client.source import JobSource
    from modelops.client.sync import Synced
    from modelops.study.spec import JobSpec

__all__ = ["Job", "JobEventRecord", "JobStatus"]
log = logging.getLogger(__name__)
LOOK_S = 25.0  # how long one question for a change waits
UNREACHABLE_S = 60.0  # how long `wait` puts up with a server that is away


class Job:
    """One job. Cheap to make; every method reads what is true now.

    Parameters
    ----------
    id
        A job id.
    home
        Where the job is stored on this machine; default as for every command, see ``MODELOPS_HOME``.
    source
        Where to read and steer the job; by default the store in ``home``. `Client.job` gives jobs of a server.
    """

    def __init__(self, id: str, home: Home | None = None, *, source: JobSource | None = None) -> None:  # noqa: A002  the word of the field
        self.id = JobId(id)
        self.source: JobSource = source or StoredSource(home or Home.from_environ(os.environ))

    def __repr__(self) -> str:
        return f"<modelops.Job {self.id}>"

    @property
    def home(self) -> Home:
        """The folders of this machine that the job is read into, or lies in."""
        return self.source.home

    # How it goes

    def status(self) -> JobStatus:
        """Return the state, the counts by replicate status, the aggregates, and the reason of the state.

        When the server cannot be reached the state is ``unknown``, with since when and what was known last.
        """
        return self.source.status(self.id)

    def wait(self, timeout: float | None = None) -> JobStatus:
        """Wait until the job has ended, also while its server restarts, and return its status.

        Parameters
        ----------
        timeout
            Seconds to wait at most; None: as long as it takes.

        Raises
        ------
        WaitTimeoutError
            It has not ended by then; it goes on.
        ServerUnreachableError
            Its server has not answered for a minute; says what to do.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        away = None
        while True:
            left = LOOK_S if deadline is None else max(0.0, min(LOOK_S, deadline - time.monotonic()))
            status = self.source.wait_for_end(self.id, left)
            if status.final:
                return status
            now = time.monotonic()
            away = None if status.unknown_since is None else away or now
            if deadline is not None and now >= deadline:
                raise WaitTimeoutError(
                    f"job {self.id} is {status.state} after {timeout:g} s; it goes on, and can be waited for again"
                )
            if away is not None:
                if now - away > UNREACHABLE_S:
                    raise ServerUnreachableError(
                        f"the server of job {self.id}", status.reason, "'modelops status' shows what runs"
                    )
                time.sleep(0.5)

    def events(self) -> list[JobEventRecord]:
        """Return the job's story: who changed what, when and why, oldest first."""
        return self.source.events(self.id)

    # What to do with it

    def cancel(self, *, at_once: bool = False) -> None:
        """Ask for the job's end: what is finished is kept.

        Parameters
        ----------
        at_once
            Do not wait, for up to a minute, for what its workers could still hand in; also if it is ending already.

        Raises
        ------
        RequestError
            It has ended already.
        """
        self.source.cancel(self.id, at_once=at_once)

    def resume(self, *, failed: bool = False) -> None:
        """Let a job that has ended run what is missing, and only that.

        Parameters
        ----------
        failed
            Try those that failed again, too.

        Raises
        ------
        RequestError
            It has not ended, or nothing is missing.
        """
        self.source.resume(self.id, failed=failed)

    def extend(
        self,
        replicates: int | None = None,
        parameters: Any = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        """Add replicates or parameter sets to a job that has ended; only the new ones run.

        Parameters
        ----------
        replicates
            How many replicates each parameter set is to have, those that it has included.
        parameters
            Parameter sets to add: whatever `Study` takes. One that the job has already is refused.
        seeds
            For a job with explicit seeds: the further ones; instead of ``replicates``.

        Raises
        ------
        RequestError
            The job has not ended, or that would add nothing.
        """
        from modelops.client.study_files import parameter_sets_of

        if isinstance(replicates, Until):
            raise RequestError(
                "extend: replicates is a number; a job with until keeps its rule, and gets it as the new max"
            )
        if replicates is None and parameters is None and seeds is None:
            raise RequestError("say what to add: replicates=400, or parameters=[...]")
        sets = None if parameters is None else parameter_sets_of(parameters)
        self.source.extend(self.id, replicates, [] if sets is None else sets.canonical(), seeds)

    # What it gave

    def results(self) -> pa.Table:
        """Return one row per replicate, sorted by (parameter set, replicate).

        Columns: ``param`` (ordinal), ``param_id``, ``replicate``, ``seed``, ``status``, the parameters, then every
        scalar output whose values all have one type. What was left out, and why, is in the table's schema metadata
        under ``modelops.left_out``. Answers also while the job runs. If more than 1,000,000 replicates have not run
        to an end, they have no rows; a warning, and ``modelops.no_rows`` in the metadata, say how many they are. If the
        stored parameters are lost, ids and seeds are null and there are no parameters; a warning says so, too.
        """
        return self._table("replicates")

    def aggregates(self) -> pa.Table:
        """Return one row per parameter set: parameters, status, how many replicates, scalar outputs."""
        return self._table("aggregates")

    def failures(self) -> pa.Table:
        """Return one row per replicate that did not succeed, with its error, traceback and last stderr."""
        return self._table("failures")

    def _table(self, name: str) -> pa.Table:
        table = self.source.table(self.id, name)
        remarks = table.schema.metadata or {}
        if lost := remarks.get(b"modelops.parameters_lost"):
            log.warning("job %s: the table has no parameters, as %s", self.id, lost.decode())
        if said := remarks.get(b"modelops.no_rows"):
            counts = ", ".join(f"{n:,} {status}" for status, n in json.loads(said).items())
            log.warning("job %s: the table has no rows of replicates that did not run: %s", self.id, counts)
        return table

    def failure_summary(self) -> pa.Table:
        """Return one row per fingerprint (type and place), the most frequent first.

        Each has its count, one full example with traceback and stderr, and the command that runs that replicate
        again on this machine. What did not run is not in it.
        """
        from modelops.store.failures import failure_summary

        return failure_summary(self.failures(), self._rerun_command)

    def _rerun_command(self, row: dict[str, Any]) -> str:
        return f"modelops bundle run --job {self.id} --param {row['param']} --replicate {row['replicate']}"

    def aggregate_failures(self) -> pa.Table:
        """Return one row per kind of aggregate that failed or was skipped, the most frequent first.

        Each has its count, the reason, and of one example the parameter set, the traceback and stderr.
        """
        return self.source.table(self.id, "aggregate_failures")

    def attempts(self) -> pa.Table:
        """Return durations, attempts, workers and hosts: what depends on where and when the job ran."""
        return self.source.table(self.id, "attempts")

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
        value = self.source.output(self.id, param, replicate, name)
        return {"value": value} if name is None and not isinstance(value, dict) else value

    def aggregate(self, param: int | str, target: str | None = None) -> Any:
        """Return an aggregate of one parameter set exactly as the bundle returned it.

        ``target`` names the aggregate entry point; it may be left out when the job has one. Raises NotFoundError
        if it was skipped or failed; the message says why.
        """
        targets = self.spec.aggregates
        if target is None and len(targets) != 1:
            raise RequestError(
                f"job {self.id} has {len(targets)} aggregates; name one of {', '.join(targets) or 'none'}"
            )
        return self.source.aggregate(self.id, param, target or targets[0])

    def log(self, param: int | str | None = None, replicate: int | None = None) -> str:
        """Return what the bundle printed: of one replicate, one parameter set, or the whole job."""
        return self.source.log(self.id, param, replicate)

    def result_files(self) -> dict[str, Path]:
        """Return the paths of the result files by name. Raises RequestError while the job is not final."""
        status = self.status()
        if not status.final:
            raise RequestError(f"job {self.id} is {status.state}; its result files are written when it ends")
        return self.source.result_paths(self.id)

    def sync(self, folder: str | Path) -> Synced:
        """Copy into a folder what is stored of the job and not there yet: segments, and at the end the result files.

        Only whole files whose digest was verified appear. Works during and after the job; again, it copies what is
        new.
        """
        from modelops.client.sync import refuse_own_folder, sync_files

        if folder == "":
            raise RequestError(
                f"job {self.id} is to be copied to '', which names no folder; write '.' for this one"
            )
        refuse_own_folder(self.home, Path(folder))
        return sync_files(self.source, self.id, Path(folder))

    # What it is

    @property
    def spec(self) -> JobSpec:
        """The frozen record of what the job is."""
        return self.source.spec(self.id)

    @cached_property
    def manifest(self) -> Manifest:
        """What the job's bundle says of itself."""
        from modelops.bundles import load_manifest

        return load_manifest(self.snapshot())

    def snapshot(self) -> Path:
        """Return the read-only folder that holds the job's bundle, fetching it if need be."""
        return self.source.snapshot(self.id)

    def params(self, param: int) -> dict[str, Any]:
        """Return one parameter set, by its ordinal."""
        return self.source.parameter_set(self.id, param).values()
