"""Letting a final job begin again: what is missing of it, or what is added to it.

Bytes first, row second: the new spec and the new parameters are stored under names of their own before the job's row
says that they are its own. Whoever is second of two at once is told so and has changed nothing.
"""

from __future__ import annotations

import contextlib
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from modelops.errors import ConflictError, RequestError
from modelops.server.facts import stored_beyond
from modelops.states import FAILURES, FINAL_JOB_STATES, OUTCOMES, AggregateStatus, JobEvent, JobState
from modelops.store import AlreadyExistsError, ChangedMeanwhileError, read_segment
from modelops.store.checkpoints import remove_beyond
from modelops.store.parameters import Parameters, write_more_parameters
from modelops.store.runs import WITHDRAWN, Note
from modelops.store.segments import job_folder, ranges_of
from modelops.store.withdrawal import NOTHING, Kept, Withdrawal, no_longer_unneeded
from modelops.study.canonical import param_id, parse_canonical
from modelops.study.extension import extended_spec, stored_in
from modelops.study.parameter_sets import ParameterSets, parameter_table
from modelops.study.ranges import Ranges
from modelops.study.spec import encode_spec, recorded_spec
from modelops.study.wording import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from modelops.server.facts import Beyond
    from modelops.store import JobRow, Objects, Records
    from modelops.store.rows import Submission
    from modelops.study.ids import AttemptId, JobId
    from modelops.study.index_line import IndexLine
    from modelops.study.spec import JobSpec
    from modelops.worker.messages import AggregateRef, SegmentRef

_FAILED: Final = frozenset(OUTCOMES.index(status) for status in FAILURES)


def resume_job(
    records: Records,
    objects: Objects,
    job: JobId,
    who: str,
    *,
    failed: bool = False,
    asked: Submission | None = None,
) -> JobRow:
    """Let a job that has ended run what is missing of it: outcomes of replicates, aggregates, result files.

    Parameters
    ----------
    failed
        Try those again, too, that have failed (or timed out, crashed, ...), and failed aggregates. Their outcomes
        do not count any more, and an event says so.
    asked
        The request that wants it, see `Records.begin_run`.

    Raises
    ------
    NotFoundError
        There is no such job.
    ConflictError
        Nothing is missing.
    ChangedMeanwhileError
        The job has not ended, or it changed just now.
    """
    row, segments, aggregates = records.committed(job)
    _refuse_unless_final(row, "resumed")
    spec = recorded_spec(row.spec, row.job)
    withdrawal = (
        _failures(objects, row, segments, aggregates, spec.line if spec.until else None)
        if failed
        else Withdrawal()
    )
    n = len(spec.line.all() - Ranges(pair for ref in segments for pair in ref.ranges))
    n_failed = sum(n for ref in segments for status, n in ref.counts.items() if status in FAILURES)
    n_sets = len(_aggregated(spec.line) - Ranges(pair for ref in aggregates for pair in ref.params))
    lacks_aggregates = bool(withdrawal or (spec.aggregates and n_sets))
    # It has no result files if its drivers failed while they wrote them.
    # A cancelled job may have got its last outcomes while it was being stopped; resumed, it ends as what they are.
    is_whole = bool(records.result_files(job)) and row.state is not JobState.CANCELLED
    if not n and not lacks_aggregates and is_whole:
        again = f": 'modelops jobs resume {job} --failed' tries those again"
        failures = f"; {n_failed} of them failed{again}" if n_failed else ""
        raise ConflictError(f"nothing is missing of job {job}: every replicate has its outcome{failures}")
    what = [f"{n} replicates without outcome"] if n else []
    what += [f"{n_failed} failed replicates again"] if failed and n_failed else []
    end = "its end" if row.state is JobState.CANCELLED else "its result files"
    why = f"resumed by {who}: {' and '.join(what) or ('aggregates' if lacks_aggregates else end)}"
    return records.begin_run(
        job,
        JobEvent.RESUMED,
        who=who,
        why=why,
        withdrawal=withdrawal,
        expected_version=row.version,
        asked=asked,
    )


def extend_job(
    records: Records,
    objects: Objects,
    job: JobId,
    who: str,
    *,
    replicates: int | None = None,
    parameters: Sequence[bytes] | None = None,
    seeds: Sequence[int] | None = None,
    asked: Submission | None = None,
) -> JobRow:
    """Add replicates, parameter sets, or both to a job that has ended; only what is new (or missing) is run.

    Parameters
    ----------
    replicates
        How many each parameter set has afterwards, old and new. None: as many as now.
    parameters
        Parameter sets to add, in canonical form (`modelops.study.canonical.canonical_json`).
    seeds
        For a job with explicit seeds: those of the added replicates.
    asked
        The request that wants it, see `Records.begin_run`.

    Raises
    ------
    NotFoundError
        There is no such job.
    RequestError
        Nothing would be added, something would be taken away, or a parameter set is wrong or there already.
    ChangedMeanwhileError
        The job has not ended, or it changed just now.
    """
    row = records.job(job)
    _refuse_unless_final(row, "extended")
    old = recorded_spec(row.spec, row.job)
    more = _checked(parameters or ())
    spec = extended_spec(old, replicates=replicates, n_more_params=len(more), more_seeds=seeds)
    if more:
        known = Parameters(objects, job, old.parameters)
        _refuse_known(known, more)
        spec = stored_in(spec, write_more_parameters(objects, job, row.run + 1, _all(known, more)))
    data = encode_spec(spec)
    beyond = stored_beyond(records, objects, job)
    notes = _set_aside(objects, job, old.line, beyond)
    study = f"study.{row.run + 1}-{sha256(data).hexdigest()[:16]}.json"
    with contextlib.suppress(AlreadyExistsError):  # its name says what is in it
        objects.put_new(f"{job_folder(job)}/{study}", data)
    return records.begin_run(
        job,
        JobEvent.EXTENDED,
        who=who,
        why=_said(old, spec, len(more), who),
        spec=data,
        study=study,
        notes=notes,
        after_epoch=beyond.newest,
        expected_version=row.version,
        asked=asked,
    )


def _set_aside(objects: Objects, job: JobId, line: IndexLine, found: Beyond) -> list[Note]:
    """Keep what is stored of indices that the job does not have yet from counting when it gets them.

    A backup of the database that was put back knows nothing of an extension after it.
    """
    remove_beyond(objects, job, line.size)
    for name in found.executions:
        objects.delete(name)
    text = f"segments of epochs up to {found.epoch} without a record do not count: no record says what they are of"
    data = {"replicates": 0, "aggregates": 0, "attempts": [], "epoch": found.epoch}
    return [Note(WITHDRAWN, text, data)] if found.epoch else []


def _refuse_unless_final(row: JobRow, what: str) -> None:
    if row.state not in FINAL_JOB_STATES:
        raise ChangedMeanwhileError(
            f"job {row.job} is {row.state}: it can be {what} once it has ended; wait for it, or cancel it"
        )


def _checked(canonicals: Sequence[bytes]) -> list[bytes]:
    """Return the parameter sets if they are as a study would have them."""
    try:
        sets = ParameterSets.of_rows([parse_canonical(text) for text in canonicals])
    except ValueError as error:
        raise RequestError(f"a parameter set is no JSON object: {error}") from error
    if not len(sets):
        return []
    parameter_table(sets)  # refuses duplicates
    for given, canonical in zip(canonicals, sets.canonical(), strict=True):
        if given != canonical:
            raise RequestError(
                f"the parameter set {given!r} is not in canonical form, which is {canonical!r}"
            )
    return list(canonicals)


def _refuse_known(known: Parameters, more: Sequence[bytes]) -> None:
    new: dict[str, int] = {param_id(text): i for i, text in enumerate(more)}
    first = 0
    for ids in known.ids():
        for at, known_id in enumerate(ids):
            if known_id in new:
                i = new[known_id]
                raise RequestError(
                    f"parameter set {i} of those to add is parameter set {first + at} of the job already: "
                    f"{more[i].decode()}; to run it more often, raise `replicates`"
                )
        first += len(ids)


def _all(known: Parameters, more: Sequence[bytes]) -> Iterator[bytes]:
    for group in known.groups():
        yield from (each.canonical for each in group)
    yield from more


def _said(old: JobSpec, new: JobSpec, n_more_params: int, who: str) -> str:
    n = new.line.size - old.line.size
    sets = f", {counted(n_more_params, 'new parameter set')}" if n_more_params else ""
    return f"extended by {who}: {counted(n, 'more replicate')}{sets}"


def _aggregated(line: IndexLine) -> Ranges:
    return line.params_of(line.all())


def _failures(
    objects: Objects,
    row: JobRow,
    segments: Sequence[SegmentRef],
    aggregates: Iterable[AggregateRef],
    line: IndexLine | None,
) -> Withdrawal:
    """Return the withdrawal of all outcomes that are failures.

    ``line``: of a job with ``until``, as what its parameter sets need is decided anew then.
    """
    kept: dict[AttemptId, Kept] = {}
    for ref in segments:
        found = {status for status, n in ref.counts.items() if n}
        if not found & FAILURES:
            continue
        if found <= FAILURES:
            kept[ref.attempt] = NOTHING
            continue
        table = read_segment(objects, row.job, ref)
        good = [status not in _FAILED for status in table.status.tolist()]
        counts = {status: n for status, n in ref.counts.items() if status not in FAILURES}
        kept[ref.attempt] = Kept(ranges_of(table.index[good]).pairs, counts)
    failed = tuple(ref.attempt for ref in aggregates if ref.counts.get(AggregateStatus.FAILED))
    if line is not None:
        lost = Ranges(p for ref in segments if ref.attempt in kept for p in ref.ranges)
        kept |= no_longer_unneeded(line, segments, lost - Ranges(p for k in kept.values() for p in k.ranges))
    if not kept and not failed:
        return Withdrawal()
    # What the runs so far have not recorded may hold failures, too.
    return Withdrawal(segments=kept, aggregates=failed, epoch=row.epoch)
