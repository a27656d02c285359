"""What failed most often in a job, in one sentence: the reason of a job that did not succeed."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa

from modelops.states import FAILURES, OUTCOMES, AggregateStatus, ReplicateStatus
from modelops.store import columns
from modelops.store.aggregate_failures import kinds_of_failure

if TYPE_CHECKING:
    from modelops.store.contents import JobContents

MAX_CHARS: Final = 300
_SUCCEEDED: Final = OUTCOMES.index(ReplicateStatus.SUCCEEDED)
_OF_BUNDLE: Final = re.compile(r'^  File "([^/<"][^"]*)", line (\d+)', re.MULTILINE)  # others are whole paths


def most_frequent_failure(contents: JobContents) -> str:
    """Say how many replicates (or, if none did, aggregates) failed, and the most frequent error; empty: none failed.

    Raises
    ------
    IntegrityError, NotFoundError
        A committed segment is damaged or gone.
    """
    counts: Counter[str] = Counter()
    examples: dict[str, tuple[int, str]] = {}
    for number, ref in enumerate(contents.segments):
        if not any(ref.counts.get(status) for status in FAILURES):
            continue
        segment = contents.read(number)
        bad = np.flatnonzero(segment.status != _SUCCEEDED)
        errors = columns.only_chunk(segment.table, "error").take(columns.fixed(bad, pa.int64()))
        marks = errors.field("fingerprint").fill_null("")
        for mark, n in zip(*(found.to_pylist() for found in _counted(marks)), strict=True):
            counts[mark] += n
            row = int(np.argmax(columns.bool_values(pa.compute.equal(marks, mark))))
            index = int(segment.index[bad[row]])
            if mark not in examples or index < examples[mark][0]:
                status = OUTCOMES[segment.status[bad[row]]]
                examples[mark] = index, _in_brief(status, errors[row].as_py())
    if counts:
        mark = min(counts, key=lambda m: (-counts[m], examples[m][0]))
        not_needed = sum(ref.counts.get(ReplicateStatus.NOT_NEEDED, 0) for ref in contents.segments)
        of = contents.spec.line.size - not_needed
        return _sentence("replicates", counts.total(), of, counts[mark], examples[mark][1])
    return _of_aggregates(contents)


def _of_aggregates(contents: JobContents) -> str:
    failed = [kind for kind in kinds_of_failure(contents) if kind["status"] == AggregateStatus.FAILED]
    if not failed:
        return ""
    n_all = len(contents.spec.line.params_of(contents.spec.line.all())) * len(contents.spec.aggregates)
    worst, n = failed[0], sum(kind["count"] for kind in failed)
    where = _place(worst["traceback"] or "") or worst["aggregate"]
    return _sentence("aggregates", n, n_all, worst["count"], f"{_short(worst['reason'])} ({where})")


def _counted(marks: pa.Array) -> tuple[pa.Array, pa.Array]:
    found = marks.value_counts()
    return found.field("values"), found.field("counts")


def _sentence(what: str, n: int, of: int, n_alike: int, brief: str) -> str:
    often = "" if n_alike == n else "once " if n_alike == 1 else f"{n_alike:,} times "
    return f"{n:,} of {of:,} {what} failed: {often}{brief}"


def _in_brief(status: ReplicateStatus, error: dict[str, str | None] | None) -> str:
    if error is None:
        return str(status)
    said = _short(": ".join(filter(None, (error["type"], error["message"]))) or str(status))
    where = _place(error["traceback"] or "")
    return f"{said} ({where})" if where else said


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_CHARS else f"{line[:MAX_CHARS]} ..."


def _place(traceback: str) -> str:
    places = _OF_BUNDLE.findall(traceback)
    return "{}:{}".format(*places[-1]) if places else ""
