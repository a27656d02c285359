"""Gather what `modelops.server.reconcile` decides by: the records of a job first, then what storage holds of it.

In this order, because bytes come before rows: whatever is recorded was stored before the look at storage.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from modelops.errors import IntegrityError, NotFoundError, RequestError, StorageError
from modelops.server.reconcile import (
    Finding,
    JobFacts,
    Mismatch,
    Orphan,
    attempt_of,
    counts_of,
    lies_in,
    newest_epoch,
)
from modelops.states import OUTCOMES, ReplicateStatus
from modelops.store import PackSlice, read_segment
from modelops.store.attempts import rows_of
from modelops.store.parameters import ADVICE, Parameters
from modelops.store.segment_table import (
    OutputsColumn,
    SegmentTable,
    open_execution,
    open_table,
    read_aggregates,
)
from modelops.store.segments import DIGITS_IN_NAME, job_folder, ranges_of
from modelops.study.ids import epoch_of
from modelops.study.ranges import Ranges
from modelops.study.spec import recorded_spec
from modelops.worker.job_lock import read_lock
from modelops.worker.messages import AggregateRef, SegmentRef

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from modelops.store import JobRow, Objects, Records
    from modelops.store.result_file import ResultFile
    from modelops.study.ids import AttemptId, JobId
    from modelops.study.index_line import IndexLine


def facts_of(
    records: Records, objects: Objects, job: JobId, *, deep: bool = False, orphans: bool = False
) -> JobFacts:
    """Look at one job.

    Parameters
    ----------
    deep
        Read every object and compare it with its digest; otherwise its size is compared. Done as well if a record
        contradicts itself.
    orphans
        Look for segments without a row, too. Only where nobody may be about to commit them.

    Raises
    ------
    NotFoundError
        There is no such job.
    StorageError
        The database or the storage does not answer, so nothing is known.
    """
    row, segments, aggregates = records.committed(job)
    folder, spec = job_folder(job), recorded_spec(row.spec, row.job)
    scope = records.scope(job).only
    result_files = records.result_files(job)
    settled = Ranges()
    if result_files and records.settled(
        job
    ):  # jobs of a time that recorded no result files are left as they are
        settled = spec.line.all() if scope is None else scope
    sizes = {name.removeprefix(f"{folder}/"): n for name, n in objects.sizes(folder).items()}
    if segments and not sizes:
        refuse_empty(objects)
    sizes |= _unlisted(objects, folder, sizes, _recorded(row, segments, aggregates, result_files))
    facts = JobFacts(
        row=row,
        spec=spec,
        segments=segments,
        aggregates=aggregates,
        result_files=result_files,
        withdrawn=records.withdrawn(job),
        settled=settled,
        owed=records.owed(job),
        sizes=sizes,
        orphans=list(_orphans(objects, job, segments, sizes, spec.line.all())) if orphans else (),
    )
    if not deep and all(sum(ref.counts.values()) == len(Ranges(ref.ranges)) for ref in segments):
        return facts
    held: dict[AttemptId, Mapping[ReplicateStatus, int]] = {}
    damaged = dict(_damage(objects, facts, held))
    return replace(facts, damaged=damaged, counted=held)


def _recorded(
    row: JobRow,
    segments: Iterable[SegmentRef],
    aggregates: Iterable[AggregateRef],
    results: Iterable[ResultFile],
) -> dict[str | None, int | None]:
    """Return how many bytes each object has of which there is a record (None: that is not recorded)."""
    recorded: dict[str | None, int | None] = {row.study: len(row.spec)}
    recorded |= {f"results/{file.name}": file.n_bytes for file in results}
    for ref in segments:
        recorded |= {ref.name: ref.n_bytes, ref.pack: ref.pack_bytes, ref.execution: None}
    for stored in aggregates:
        recorded |= {stored.name: stored.n_bytes, stored.pack: stored.pack_bytes}
    return recorded


def _unlisted(
    objects: Objects, folder: str, sizes: Mapping[str, int], recorded: Mapping[str | None, int | None]
) -> dict[str, int]:
    """Return the sizes of the recorded objects that are there although a listing does not say so.

    A service may leave objects out of it, or list what was there before. So no object is said to be gone, or cut, that
    was not looked for by its name.
    """
    found = {}
    for name, n_bytes in recorded.items():
        if name is not None and sizes.get(name) != (sizes.get(name, -1) if n_bytes is None else n_bytes):
            with contextlib.suppress(NotFoundError):
                found[name] = objects.size(f"{folder}/{name}")
    return found


@dataclass(frozen=True)
class Beyond:
    """What is stored of indices that a job does not have: by an extension after the backup of which its records are.

    ``epoch``: segments of epochs up to this hold such (0: none does). ``executions``: names of such execution data.
    ``newest``: the highest epoch of which anything is stored.
    """

    epoch: int
    newest: int
    executions: list[str]


def stored_beyond(records: Records, objects: Objects, job: JobId) -> Beyond:
    """Return what must not be taken for that of new indices when a job gets more."""
    row, segments, _ = records.committed(job)
    folder, line = job_folder(job), recorded_spec(row.spec, job).line
    sizes = {name.removeprefix(f"{folder}/"): n for name, n in objects.sizes(folder).items()}
    orphans = [orphan.ref for orphan in _without_row(objects, job, segments, sizes)]
    known = {ref.execution for ref in segments}
    unknown = [f"{folder}/{n}" for n in sizes if n.startswith("executions/") and n not in known]
    return Beyond(
        max((epoch_of(ref.attempt) for ref in orphans if Ranges(ref.ranges) - line.all()), default=0),
        newest_epoch(row, sizes),
        [name for name in unknown if not _is_of_line(objects, line, name)],
    )


def _is_of_line(objects: Objects, line: IndexLine, name: str) -> bool:
    try:
        rows_of(line, open_execution(objects.get(name), name), name)
    except (IntegrityError, NotFoundError):
        return False
    return True


def _damage(
    objects: Objects, facts: JobFacts, held: dict[AttemptId, Mapping[ReplicateStatus, int]]
) -> Iterator[tuple[str, str]]:
    """Yield the damaged objects, and what is wrong; those that are gone or too short are seen without reading.

    ``held``: gets what each whole segment holds of the indices that its record names.
    """
    job = facts.row.job
    folder = job_folder(job)

    def check(
        name: str | None, n_bytes: int | None, verify: Callable[[], object]
    ) -> Iterator[tuple[str, str]]:
        if name is None or facts.wrong(name, n_bytes):
            return
        try:
            verify()
        except (IntegrityError, NotFoundError, RequestError) as error:
            yield name, str(error)

    def look(ref: SegmentRef) -> None:
        segment = verify_segment(objects, job, ref)
        held[ref.attempt] = counts_of(segment.status[lies_in(segment.index, ref.ranges)])

    for ref in facts.segments:
        yield from check(ref.name, ref.n_bytes, lambda ref=ref: look(ref))  # type: ignore[misc]
    for stored in facts.aggregates:
        yield from check(
            stored.name,
            stored.n_bytes,
            lambda stored=stored: _verify_aggregates(objects, job, stored),  # type: ignore[misc]
        )
    for name in facts.sizes:
        if name.startswith("executions/"):
            yield from check(name, None, lambda name=name: _verify_execution(objects, facts, name))  # type: ignore[misc]
    study = facts.row.study
    yield from check(
        study, len(facts.row.spec), lambda: _compare(objects, f"{folder}/{study}", facts.row.spec)
    )
    for file in facts.result_files if facts.is_final else ():
        name = f"results/{file.name}"
        yield from check(
            name,
            file.n_bytes,
            lambda name=name, file=file: _verify_digest(objects, f"{folder}/{name}", file.sha256),  # type: ignore[misc]
        )


def lost_for_good(objects: Objects, row: JobRow, *, deep: bool) -> list[Finding]:
    """Return what is damaged or gone of a job and cannot be made again from what is recorded.

    Parameters
    ----------
    deep
        Read the objects; otherwise only whether they are there is looked at. A job that has stored nothing may have no
        lock yet.

    Raises
    ------
    StorageError
        The storage does not answer.
    """
    job, folder, spec = row.job, job_folder(row.job), recorded_spec(row.spec, row.job)

    def found(kind: Mismatch, name: str, look: Callable[[], object]) -> list[Finding]:
        try:
            if deep:
                look()
            elif not objects.exists(name):
                raise NotFoundError(name)
        except NotFoundError:
            refuse_empty(objects)
            return [Finding(job, kind, name, f"{name} is gone; {_TO_DO[kind]}")]
        except IntegrityError as error:
            return [Finding(job, kind, name, str(error))]
        except RequestError:  # of a newer version, which is another matter
            return []
        return []

    name = f"{folder}/{spec.parameters}"
    lost = found(
        Mismatch.PARAMETERS_DAMAGED, name, lambda: Parameters(objects, job, spec.parameters).verify()
    )
    if deep and next(objects.list(f"{folder}/segments"), None) is not None:
        lost += found(Mismatch.LOCK_DAMAGED, f"{folder}/lock", lambda: read_lock(objects, job))
    return lost


def refuse_empty(objects: Objects) -> None:
    """Raise StorageError if nothing at all is stored: then a volume is missing, and not the objects on it."""
    if next(objects.list(""), None) is None:
        raise StorageError(
            f"{objects!r} is empty, and jobs have stored objects there; is its volume mounted, is it the right place?"
        )


_BACKUP: Final = "put it back from a backup, or submit the study again"
_TO_DO: Final = {Mismatch.PARAMETERS_DAMAGED: ADVICE, Mismatch.LOCK_DAMAGED: _BACKUP}


def verify_segment(objects: Objects, job: JobId, ref: SegmentRef) -> SegmentTable:
    """Read a segment and its pack and compare them with their digests. Raises IntegrityError or NotFoundError."""
    segment = read_segment(objects, job, ref)
    if ref.pack:
        _verify_slices(objects, OutputsColumn(segment.table, segment.pack))
    return segment


def _verify_aggregates(objects: Objects, job: JobId, ref: AggregateRef) -> None:
    table = read_aggregates(objects, job, ref).combine_chunks()
    if ref.pack:
        _verify_slices(objects, OutputsColumn(table, f"{job_folder(job)}/{ref.pack}"))


def _verify_slices(objects: Objects, outputs: OutputsColumn) -> None:
    for row in outputs.rows():
        for _, _, data in row:
            if isinstance(data, PackSlice):
                data.verify(objects)


def _verify_execution(objects: Objects, facts: JobFacts, name: str) -> None:
    # It has no digest: what cannot be read is found, and a wrong duration is not.
    name = f"{job_folder(facts.row.job)}/{name}"
    table = open_execution(objects.get(name), name)
    rows_of(facts.spec.line, table, name)
    if table.schema.metadata[b"modelops.attempt"].decode() != attempt_of(name):
        raise IntegrityError(f"{name} is of another attempt")


def _compare(objects: Objects, name: str, expected: bytes) -> None:
    if objects.get(name) != expected:
        raise IntegrityError(f"{name} is not what was recorded")


def _verify_digest(objects: Objects, name: str, expected: str) -> None:
    digest = sha256()
    for piece in objects.stream(name):
        digest.update(piece)
    if digest.hexdigest() != expected:
        raise IntegrityError(f"{name} is not what was written")


def _orphans(
    objects: Objects, job: JobId, segments: list[SegmentRef], sizes: dict[str, int], line: Ranges
) -> Iterator[Orphan]:
    """Yield the segments without a row that are whole, of this job, and hold indices of its line only."""
    for orphan in _without_row(objects, job, segments, sizes):
        if not Ranges(orphan.ref.ranges) - line:
            yield orphan


def _without_row(
    objects: Objects, job: JobId, segments: list[SegmentRef], sizes: dict[str, int]
) -> Iterator[Orphan]:
    known = {ref.name for ref in segments} | {ref.attempt for ref in segments}
    for name, n_bytes in sorted(sizes.items()):
        if name.startswith("segments/") and not known & {name, attempt_of(name)}:
            orphan = _orphan(objects, job, name, n_bytes, sizes)
            if orphan is not None:
                yield orphan


def _orphan(objects: Objects, job: JobId, name: str, n_bytes: int, sizes: dict[str, int]) -> Orphan | None:
    attempt = attempt_of(name)
    in_name = name.removesuffix(".arrow").rpartition(".")[2]
    pack, execution = f"packs/{attempt}.pack", f"executions/{attempt}.arrow"
    try:
        data = objects.get(f"{job_folder(job)}/{name}")
        digest = sha256(data).hexdigest()
        if len(in_name) != DIGITS_IN_NAME or not digest.startswith(in_name):
            return None  # damaged, or of a time when names said less: then nothing can be said of it
        table = open_table(data, name)
        metadata = table.schema.metadata or {}
        if (metadata.get(b"modelops.job"), metadata.get(b"modelops.attempt")) != (
            job.encode(),
            attempt.encode(),
        ):
            return None
        index = table["index"].to_numpy()
        ref = SegmentRef(
            attempt=attempt,
            name=name,
            digest=digest,
            n_bytes=n_bytes,
            ranges=ranges_of(index).pairs,
            counts={},
            pack=pack if pack in sizes else None,
            pack_bytes=sizes.get(pack, 0),
            execution=execution if execution in sizes else None,
        )
        segment = SegmentTable(objects, job, ref, table.combine_chunks())
        _verify_slices(objects, OutputsColumn(segment.table, segment.pack))
    except (IntegrityError, NotFoundError, RequestError, KeyError):
        return None
    if not len(segment) or int(segment.status.max(initial=0)) >= len(OUTCOMES):
        return None
    return Orphan(ref, segment.index, segment.status)
