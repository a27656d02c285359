"""Make the records of one job true again: carry out what `modelops.server.reconcile` plans. Needs the job's lease.

A crash between two steps leaves less to do for the next time. What is found is written into the job's story by the
transaction that mends it, so that it is counted once.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from modelops.errors import IntegrityError, NotFoundError
from modelops.server.facts import facts_of
from modelops.server.reconcile import Mismatch, Plan, newest_epoch, plan_for
from modelops.states import JobEvent
from modelops.store.contents import JobContents
from modelops.store.results import finalize
from modelops.store.runs import MISMATCH, Note
from modelops.store.segments import job_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from modelops.server.reconcile import Finding, JobFacts
    from modelops.store import Objects, Records
    from modelops.study.ids import AttemptId, JobId

log = logging.getLogger(__name__)
MAX_NAMED: Final = 20  # in one event
MAX_SAID: Final = 3  # in its sentence


def mend_job(
    records: Records,
    objects: Objects,
    job: JobId,
    epoch: int,
    who: str,
    *,
    held: Callable[[], frozenset[AttemptId] | None] = frozenset,
    above: Callable[[int], int] | None = None,
    deep: bool = False,
) -> list[Finding]:
    """Compare the records of a job with what is stored, and make both agree; return what was found.

    Damaged segments and aggregates count no more, and are made again: by the run that goes on, or, if the job has
    ended, by a new one that runs just that. Whole segments that no record knows are adopted. Result files are written
    again.

    Parameters
    ----------
    epoch
        Of the lease that the caller holds; nobody else writes to the job meanwhile.
    held
        Asked only if there is something to adopt: the attempts that workers have, which their driver will commit;
        None if that is not known. Then nothing is adopted.
    above
        Of a caller that has stored nothing yet under ``epoch``: takes the lease again until its epoch is higher than
        this one, of which something is stored, and returns it. So it is after a backup of the database was put back;
        objects of two attempts must not have one name.
    deep
        Read every object and compare it with its digest.

    Raises
    ------
    LeaseLostError
        ``epoch`` is not the job's any more.
    StorageError
        The database or the storage does not answer.
    """
    facts = facts_of(records, objects, job, deep=deep, orphans=True)
    if above is not None and (stored := newest_epoch(facts.row, facts.sizes)) >= epoch:
        epoch = above(stored)
        facts = replace(facts, row=records.job(job))
    facts = _without_held(facts, held)
    plan = plan_for(facts)
    if not plan:
        return []
    if plan.restores_study:
        objects.put(f"{job_folder(job)}/{facts.row.study}", facts.row.spec)
    for name in plan.remove:
        objects.delete(f"{job_folder(job)}/{name}")
    notes = [_note(kind, found) for kind, found in _by_kind(plan.findings)]
    why = "; ".join(note.text for note in notes) or "outcomes were withdrawn when the run was at its end"
    if plan.run is not None:
        records.begin_run(
            job, JobEvent.REPAIRED, who=who, why=why, withdrawal=plan.withdrawal, only=plan.run, notes=notes,
            epoch=epoch, expected_version=facts.row.version,
        )  # fmt: skip
    else:
        records.withdraw(job, epoch, plan.withdrawal, who=who, why=why, notes=notes)
    if plan.adopt:
        records.commit_segments(job, epoch, plan.adopt)
    for finding in plan.findings:
        log.warning("job %s: %s: %s", job, finding.kind, finding.text, extra={"job": job})
    if plan.remakes_results:
        try:
            files = finalize(JobContents.of(objects, records, job))
        except (IntegrityError, NotFoundError):
            if deep:
                raise
            return [*plan.findings, *mend_job(records, objects, job, epoch, who, held=held, deep=True)]
        records.record_results(job, who, files, epoch=epoch, why="the result files are made again")
    return list(plan.findings)


def needs_mending(
    records: Records, objects: Objects, job: JobId, *, deep: bool = False
) -> tuple[JobFacts, Plan]:
    """Return what `mend_job` would find, without doing anything and without the job's lease."""
    facts = facts_of(records, objects, job, deep=deep, orphans=False)
    if facts.is_final:  # otherwise segments without a row may be about to get theirs
        facts = facts_of(records, objects, job, deep=deep, orphans=True)
    return facts, plan_for(facts)


def record_findings(
    records: Records, who: str, findings: Iterable[Finding], *, unless_there: bool = False
) -> None:
    """Write into the stories of the jobs what was found, and not repaired by `mend_job`.

    ``unless_there``: not if a story says just that lately.
    """
    by_job: defaultdict[JobId, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_job[finding.job].append(finding)
    for job, found in by_job.items():
        for kind, same in _by_kind(found):
            note = _note(kind, same)
            records.add_event(job, who, note.kind, note.text, note.data, unless_there=unless_there)


def _without_held(facts: JobFacts, held: Callable[[], frozenset[AttemptId] | None]) -> JobFacts:
    if not facts.orphans:
        return facts
    known = held()
    orphans = [] if known is None else [o for o in facts.orphans if o.ref.attempt not in known]
    return replace(facts, orphans=orphans)


def _by_kind(findings: Sequence[Finding]) -> list[tuple[Mismatch, list[Finding]]]:
    by_kind: defaultdict[Mismatch, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_kind[finding.kind].append(finding)
    return list(by_kind.items())


def _note(kind: Mismatch, found: Sequence[Finding]) -> Note:
    """Return what the job's story says of findings of one kind; it calls objects by their names in the job's folder."""
    folder = f"{job_folder(found[0].job)}/"
    said = "; ".join(finding.told for finding in found[:MAX_SAID])
    more = f" (and {len(found) - MAX_SAID} more)" if len(found) > MAX_SAID else ""
    named = [finding.what.removeprefix(folder) for finding in found[:MAX_NAMED]]
    return Note(MISMATCH, f"{said}{more}", {"kind": str(kind), "n": len(found), "what": named})
