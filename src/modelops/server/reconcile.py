"""Do records, stored objects and what runs agree? What is to be done where they do not. Pure: facts in, plans out.

`modelops.server.facts` gathers the facts of a job, `modelops.server.mend` carries a plan out, and
`modelops.server.reconciler` does both again and again. Why it is like this: ``docs/explanation/reconciling.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from modelops.states import FINAL_JOB_STATES, STORED, JobState, ReplicateStatus
from modelops.store.runs import Withdrawn
from modelops.store.segments import job_folder, ranges_of
from modelops.store.withdrawal import NOTHING, Kept, Withdrawal, no_longer_unneeded, stale_aggregates
from modelops.study.ids import AttemptId, JobId, epoch_of
from modelops.study.ranges import Range, Ranges
from modelops.study.wording import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy.typing as npt

    from modelops.store import JobRow
    from modelops.store.result_file import ResultFile
    from modelops.study.spec import JobSpec
    from modelops.worker.messages import AggregateRef, SegmentRef

# While result files are made nothing is adopted. What arrives late when a job was ended is adopted on resuming.
ADOPTS: Final = frozenset({JobState.QUEUED, JobState.PREPARING, JobState.RUNNING})


class Mismatch(StrEnum):
    """A way in which what the system says can differ from what is."""

    STATE_DIFFERS = "state_differs"
    SEGMENT_DAMAGED = "segment_damaged"
    COUNTS_DIFFER = "counts_differ"
    AGGREGATE_DAMAGED = "aggregate_damaged"
    EXECUTION_DAMAGED = "execution_damaged"
    STUDY_DAMAGED = "study_damaged"
    STUDY_UNREADABLE = "study_unreadable"
    RESULTS_DAMAGED = "results_damaged"
    PARAMETERS_DAMAGED = "parameters_damaged"
    LOCK_DAMAGED = "lock_damaged"
    BUNDLE_DAMAGED = "bundle_damaged"
    OUTCOMES_MISSING = "outcomes_missing"
    SEGMENT_UNRECORDED = "segment_unrecorded"
    NOBODY_RUNS = "nobody_runs"
    RUNS_AFTER_END = "runs_after_end"


# What nothing that is recorded could be made from again: it is said, with what a person can do.
BEYOND_REPAIR: Final = frozenset(
    {
        Mismatch.STUDY_UNREADABLE,
        Mismatch.PARAMETERS_DAMAGED,
        Mismatch.LOCK_DAMAGED,
        Mismatch.BUNDLE_DAMAGED,
    }
)


_COUNTED: Final = ("segments/", "aggregates/", "packs/")
_OF_ATTEMPTS: Final = (*_COUNTED, "executions/")
_MOST_UNRECORDED_EPOCHS: Final = 1_000


class Finding(msgspec.Struct, frozen=True):
    """One disagreement. ``what``: the object, below the job's folder, or the attempt."""

    job: JobId
    kind: Mismatch
    what: str
    text: str

    @property
    def told(self) -> str:
        """The text for people: it calls objects by their names in the job's folder."""
        return self.text.replace(f"{job_folder(self.job)}/", "")


def lies_in(index: npt.NDArray[np.int64], ranges: Iterable[Range]) -> npt.NDArray[np.bool_]:
    """Say of each index whether it lies in one of these ranges, which ascend."""
    edges = np.array([*ranges], np.int64).ravel()
    inside: npt.NDArray[np.bool_] = np.searchsorted(edges, index, side="right") % 2 == 1
    return inside


def counts_of(status: npt.NDArray[np.uint8]) -> dict[ReplicateStatus, int]:
    """Count outcomes by their codes in a segment."""
    found = np.bincount(status, minlength=len(STORED)).tolist()
    return {status: n for status, n in zip(STORED, found, strict=True) if n}


@dataclass(frozen=True)
class Orphan:
    """A whole, verified segment without a row: its reference, and index and code of each of its outcomes."""

    ref: SegmentRef
    index: npt.NDArray[np.int64]
    status: npt.NDArray[np.uint8]

    def only(self, free: Ranges) -> SegmentRef | None:
        """Return the reference to those of its outcomes that are of these indices; None if there are none."""
        ranges = Ranges(self.ref.ranges) & free
        if not ranges:
            return None
        mine = lies_in(self.index, ranges.pairs)
        counts = counts_of(self.status[mine])
        return msgspec.structs.replace(self.ref, ranges=ranges_of(self.index[mine]).pairs, counts=counts)


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """What is recorded of one job, and what is stored of it. Names are below the job's folder.

    ``settled``: what had its outcomes when the run settled (nothing if it ended otherwise, or has not).
    ``owed``: indices of which outcomes were withdrawn when the run could no longer run them (None: nothing was).
    ``sizes``: bytes of each object that is there. ``damaged``: what was found when objects were read, by name.
    ``counted``: what whole segments were found to hold of the indices that their records name, by attempt.
    ``orphans``: segments that could be adopted; none were looked for if the job may have attempts in flight.
    """

    row: JobRow
    spec: JobSpec
    segments: Sequence[SegmentRef] = ()
    aggregates: Sequence[AggregateRef] = ()
    result_files: Sequence[ResultFile] = ()
    withdrawn: Withdrawn = field(default=Withdrawn(frozenset(), 0))
    settled: Ranges = field(default_factory=Ranges)
    owed: Ranges | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    damaged: Mapping[str, str] = field(default_factory=dict)
    counted: Mapping[AttemptId, Mapping[ReplicateStatus, int]] = field(default_factory=dict)
    orphans: Sequence[Orphan] = ()

    @property
    def is_final(self) -> bool:
        """Whether the job has ended."""
        return self.row.state in FINAL_JOB_STATES

    @property
    def missing(self) -> Ranges:
        """The indices without a committed outcome."""
        return self.spec.line.all() - _indices(self.segments)

    def wrong(self, name: str | None, n_bytes: int | None = None) -> str:
        """Say what is wrong with an object; empty: nothing, as far as was looked, or none is meant."""
        if name is None:
            return ""
        if name not in self.sizes:
            return f"{name} is gone"
        if n_bytes is not None and self.sizes[name] != n_bytes:
            return f"{name} has {self.sizes[name]} bytes instead of {n_bytes}"
        return self.damaged.get(name, "")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done about a job, and why.

    ``run``: the job has ended and begins again, to run these indices and nothing else (None: it does not begin again).
    ``adopt``: segments to commit. ``remove``: damaged objects that would be read although nothing refers to them.
    """

    findings: Sequence[Finding] = ()
    withdrawal: Withdrawal = field(default_factory=Withdrawal)
    run: Ranges | None = None
    adopt: Sequence[SegmentRef] = ()
    restores_study: bool = False
    remakes_results: bool = False
    remove: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.findings) or self.run is not None


def plan_for(facts: JobFacts) -> Plan:
    """Return what is to be done so that records and storage agree again."""
    said = _Said(facts.row.job)
    bad = [
        ref
        for ref in facts.segments
        if said.note(Mismatch.SEGMENT_DAMAGED, ref.name, _wrong_segment(ref, facts))
    ]
    attempts = {ref.attempt for ref in bad}
    whole = [ref for ref in facts.segments if ref.attempt not in attempts]
    recounted = _recounted(facts, whole, said)
    undone = no_longer_unneeded(facts.spec.line, whole, _indices(bad)) if facts.spec.until else {}
    undecided = Ranges(p for ref in whole if ref.attempt in undone for p in ref.ranges)
    undecided = undecided - Ranges(p for kept in undone.values() for p in kept.ranges)
    aggregates = _bad_aggregates(facts, said)
    executions = _bad_executions(facts, whole, said)
    study = said.note(
        Mismatch.STUDY_DAMAGED, facts.row.study, facts.wrong(facts.row.study, len(facts.row.spec))
    )
    adopt = _adoptable(facts, facts.spec.line.all() - (_indices(whole) - undecided), said)
    run = _run(facts, _indices(bad) | undecided, adopt, said) if facts.is_final else None
    if facts.is_final and run is None and aggregates:
        run = Ranges()  # aggregates only
    if facts.is_final and run is None and recounted:
        run = Ranges()  # nothing: its end is decided anew
    results = False
    if facts.is_final and run is None:
        for file in facts.result_files:
            name = f"results/{file.name}"
            results |= said.note(Mismatch.RESULTS_DAMAGED, name, facts.wrong(name, file.n_bytes))
    return Plan(
        findings=said.findings,
        withdrawal=Withdrawal(
            segments=dict.fromkeys(attempts, NOTHING) | recounted | undone,
            aggregates=tuple(aggregates),
            executions=tuple(executions),
        ),
        run=run,
        adopt=adopt,
        restores_study=study,
        remakes_results=results,
        remove=[name for name in facts.damaged if name.startswith("executions/")],
    )


def _run(facts: JobFacts, lost: Ranges, adopt: Sequence[SegmentRef], said: _Said) -> Ranges | None:
    """Return what a job that has ended must run again; None: nothing."""
    run = lost | _indices(adopt)
    begins = bool(run) or facts.owed is not None
    run |= facts.owed or Ranges()
    if facts.owed is None and (missing := _missing(facts, run)):
        said.note(
            Mismatch.OUTCOMES_MISSING, "", f"the job settled and is {facts.row.state}, without {missing}"
        )
        return run | (facts.missing & facts.settled)
    return run if begins else None


def _missing(facts: JobFacts, known: Ranges) -> str:
    """Say what a job lacks that it had when it settled, apart from these indices."""
    if n := len((facts.missing & facts.settled) - known):
        return f"the outcome of {counted(n, 'replicate')}"
    line = facts.spec.line
    if facts.settled != line.all():
        return ""
    sets = line.params_of(line.all()) - Ranges(pair for ref in facts.aggregates for pair in ref.params)
    return f"the aggregate of {counted(len(sets), 'parameter set')}" if facts.spec.aggregates and sets else ""


def _recounted(facts: JobFacts, segments: Iterable[SegmentRef], said: _Said) -> dict[AttemptId, Kept]:
    """Return what is really in the segments whose records count otherwise."""
    out = {}
    for ref in segments:
        held = facts.counted.get(ref.attempt, ref.counts)
        if dict(held) != dict(ref.counts):
            text = f"the record of {ref.name} counts {_counts(ref.counts)}, and it holds {_counts(held)}"
            said.note(Mismatch.COUNTS_DIFFER, ref.name, text)
            out[ref.attempt] = Kept(tuple(ref.ranges), held)
    return out


def _counts(counts: Mapping[ReplicateStatus, int]) -> str:
    return ", ".join(f"{n} {status}" for status, n in sorted(counts.items())) or "nothing"


def _wrong_segment(ref: SegmentRef, facts: JobFacts) -> str:
    n_counted = sum(facts.counted.get(ref.attempt, ref.counts).values())
    if n_counted != len(Ranges(ref.ranges)):
        return f"the record of {ref.name} counts {n_counted} outcomes of {len(Ranges(ref.ranges))}"
    return facts.wrong(ref.name, ref.n_bytes) or facts.wrong(ref.pack, ref.pack_bytes)


def _bad_aggregates(facts: JobFacts, said: _Said) -> list[AttemptId]:
    """Return the aggregates to withdraw. Those that become stale as segments are withdrawn are not named here."""
    stale = stale_aggregates(
        facts.spec.line,
        [(ref.digest, ref.ranges) for ref in facts.segments],
        [(ref.attempt, ref.params, ref.inputs) for ref in facts.aggregates],
    )
    bad = []
    for ref in facts.aggregates:
        wrong = facts.wrong(ref.name, ref.n_bytes) or facts.wrong(ref.pack, ref.pack_bytes)
        # One that failed without a worker has read nothing. A job from before stale ones were dropped is left alone.
        if ref.attempt in stale and ref.inputs and (facts.result_files or not facts.is_final):
            wrong = wrong or f"{ref.name} was made from other outcomes than those that count"
        if said.note(Mismatch.AGGREGATE_DAMAGED, ref.name, wrong):
            bad.append(ref.attempt)
    return bad


def _bad_executions(facts: JobFacts, segments: Sequence[SegmentRef], said: _Said) -> list[AttemptId]:
    """Return the attempts whose execution data is lost; their outcomes count all the same."""
    named = {ref.execution: ref.attempt for ref in segments if ref.execution}
    bad = {name: text for name in named if (text := facts.wrong(name))}
    bad |= {name: text for name, text in facts.damaged.items() if name.startswith("executions/")}
    for name, text in bad.items():
        said.note(Mismatch.EXECUTION_DAMAGED, name, text)
    return [attempt for name, attempt in named.items() if name in bad]


def _adoptable(facts: JobFacts, free: Ranges, said: _Said) -> list[SegmentRef]:
    """Return the segments to commit: each for what nobody else has, the older first."""
    if facts.is_final:
        free &= facts.settled
    elif facts.row.state not in ADOPTS:
        return []
    adopt = []
    for orphan in sorted(facts.orphans, key=lambda o: o.ref.attempt):
        ref = orphan.only(free) if may_count(orphan.ref.attempt, facts) else None
        if ref is not None:
            free -= Ranges(ref.ranges)
            if facts.wrong(ref.execution):
                ref = msgspec.structs.replace(ref, execution=None)
            adopt.append(ref)
            n = counted(len(Ranges(ref.ranges)), "outcome")
            text = f"{ref.name} is whole, and no record said so; from now on it counts, with {n}"
            said.note(Mismatch.SEGMENT_UNRECORDED, ref.name, text)
    return adopt


def _indices(refs: Iterable[SegmentRef]) -> Ranges:
    return Ranges(pair for ref in refs for pair in ref.ranges)


def may_count(attempt: AttemptId, facts: JobFacts) -> bool:
    """Say whether a segment of this attempt may still be made to count: nothing of it was withdrawn."""
    gone = facts.withdrawn
    return attempt not in gone.attempts and gone.epoch < epoch_of(attempt) <= facts.row.epoch


def never_counts(facts: JobFacts) -> list[str]:
    """Return the objects of a job that has ended that count for nothing, and never will.

    Segments with an outcome that nobody else has are kept: they are adopted when the job is resumed.
    """
    if not facts.is_final:
        return []
    free = facts.missing
    hopeful = {
        o.ref.attempt for o in facts.orphans if may_count(o.ref.attempt, facts) and o.only(free) is not None
    }
    used = {ref.name for ref in facts.segments} | {ref.name for ref in facts.aggregates}
    packs = {ref.pack for ref in facts.segments} | {ref.pack for ref in facts.aggregates}
    return [
        name
        for name in sorted(facts.sizes)
        if name.startswith(_COUNTED) and name not in used | packs and attempt_of(name) not in hopeful
    ]


def attempt_of(name: str) -> AttemptId:
    """Return the attempt that made an object, from its name."""
    return AttemptId(name.rpartition("/")[2].partition(".")[0])


def newest_epoch(row: JobRow, names: Iterable[str]) -> int:
    """Return the highest epoch of which an attempt has stored something, by the names of objects; 0: none has."""
    within = row.epoch + _MOST_UNRECORDED_EPOCHS  # what is named otherwise is no object of ours
    stored = (epoch_of(attempt_of(name)) for name in names if name.startswith(_OF_ATTEMPTS))
    return max((epoch for epoch in stored if epoch <= within), default=0)


# What runs


@dataclass(frozen=True)
class Held:
    """An attempt that a worker has: it waits there, runs, is storing, or (not ``live``) its receipt is kept."""

    job: JobId
    attempt: AttemptId
    worker: str
    live: bool


def nobody_runs(
    job: JobId, submitted: Mapping[AttemptId, str], held: Mapping[str, Iterable[Held]]
) -> list[Finding]:
    """Return the attempts that a driver waits for and that their worker, which answered, does not have.

    Parameters
    ----------
    submitted
        The worker of each attempt.
    held
        What workers that answered have.
    """
    return [
        Finding(
            job,
            Mismatch.NOBODY_RUNS,
            attempt,
            f"attempt {attempt} is said to run on {worker}, which has no such",
        )
        for attempt, worker in submitted.items()
        if worker in held and not any((h.job, h.attempt) == (job, attempt) for h in held[worker])
    ]


def runs_after_end(held: Iterable[Held], final: Mapping[JobId, JobState]) -> list[Finding]:
    """Return the attempts that run although their job has ended. ``final``: the jobs that have."""
    return [
        Finding(
            h.job,
            Mismatch.RUNS_AFTER_END,
            h.attempt,
            f"attempt {h.attempt} runs on {h.worker}, and the job is {final[h.job]}",
        )
        for h in held
        if h.live and h.job in final
    ]


class _Said:
    """Collects findings."""

    def __init__(self, job: JobId) -> None:
        self._job = job
        self.findings: list[Finding] = []

    def note(self, kind: Mismatch, what: str, text: str) -> bool:
        """Note a finding, if there is anything to say; return whether there was."""
        if text:
            self.findings.append(Finding(self._job, kind, what, text))
        return bool(text)
