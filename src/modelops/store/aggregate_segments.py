"""Aggregate segments: how the aggregates of some parameter sets ended. Format: docs/reference/segments.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from modelops.errors import InternalError
from modelops.states import AggregateStatus
from modelops.store import columns
from modelops.store.segment_body import Body, Cells, Listed, Output, StoredError
from modelops.store.segments import job_folder, ranges_of, store_table
from modelops.worker.messages import AggregateRef

if TYPE_CHECKING:
    from collections.abc import Iterable

    from modelops.store.objects import Objects
    from modelops.study.ids import AttemptId, JobId

AGGREGATE_OUTCOMES: Final = tuple(AggregateStatus)  # the position is the code in the file, never renumbered
AGGREGATE_CODE: Final = {status: code for code, status in enumerate(AGGREGATE_OUTCOMES)}


class AggregateRow(NamedTuple):
    """How one aggregate (``target``, an entry point) of one parameter set ended."""

    param: int
    target: str
    status: AggregateStatus
    n_succeeded: int
    n_replicates: int
    reason: str = ""
    returned_dict: bool = True
    outputs: Sequence[Output] = ()
    error: StoredError | None = None


_BodyRow = tuple[bool, Sequence[Output], StoredError | None]


def _listed(rows: Sequence[_BodyRow]) -> Listed:
    return Listed([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


class AggregateWriter:
    """Collects the aggregates of some parameter sets and stores them as an aggregate segment."""

    def __init__(self, objects: Objects, job: JobId, attempt: AttemptId) -> None:
        self._objects, self._job, self._attempt = objects, job, attempt
        self._columns: dict[str, list[Any]] = {name: [] for name in AggregateRow._fields[:-3]}
        self._body: list[Listed | Cells] = []
        self._rows: list[_BodyRow] = []  # behind those

    def add(self, row: AggregateRow) -> None:
        """Take one row; the order of calls does not matter."""
        for column, value in zip(self._columns.values(), row, strict=False):
            column.append(value)
        self._rows.append((row.returned_dict, row.outputs, row.error))

    def add_succeeded(
        self,
        first: int,
        target: str,
        n_succeeded: Sequence[int],
        n_replicates: Sequence[int],
        made: Sequence[Listed | Cells],
    ) -> None:
        """Take the rows of consecutive parameter sets; ``made``: what their aggregates returned."""
        n = sum(map(len, made))
        rows: dict[str, Iterable[Any]] = {
            "param": range(first, first + n),
            "target": [target] * n,
            "status": [AggregateStatus.SUCCEEDED] * n,
            "n_succeeded": n_succeeded,
            "n_replicates": n_replicates,
            "reason": [""] * n,
        }
        for name, values in rows.items():
            self._columns[name].extend(values)
        self._body += [*self._listed_rows(), *made]

    def _listed_rows(self) -> list[Listed]:
        """Return what was added row by row since this was last called, in one part or none."""
        rows, self._rows = self._rows, []
        return [_listed(rows)] if rows else []

    def _in_order(self) -> tuple[dict[str, list[Any]], list[Listed | Cells]]:
        """Return columns and outputs with their rows sorted by parameter set and target. Most often they are."""
        params, targets = self._columns["param"], self._columns["target"]
        self._body += self._listed_rows()
        if len(set(targets)) < 2 and (np.diff(np.array(params, np.int64)) > 0).all():
            return self._columns, self._body
        keys = list(zip(params, targets, strict=True))
        if len(set(keys)) < len(keys):
            raise InternalError(f"attempt {self._attempt} has two rows for one parameter set and target")
        order = sorted(range(len(keys)), key=keys.__getitem__)
        listed = [part if isinstance(part, Listed) else part.listed() for part in self._body]
        rows = [row for p in listed for row in zip(p.returned, p.outputs, p.errors, strict=True)]
        return (
            {name: [column[i] for i in order] for name, column in self._columns.items()},
            [_listed([rows[i] for i in order])],
        )

    def finish(self, inputs: Iterable[str]) -> AggregateRef:
        """Store pack and segment and return what to commit. ``inputs``: digests of the segments it read."""
        rows, parts = self._in_order()
        body = Body(
            self._objects,
            job_folder(self._job),
            f"packs/{self._attempt}.pack",
            parts,
        )
        params = np.array(rows["param"], np.int64)
        counts = Counter(rows["status"])
        codes = np.fromiter(map(AGGREGATE_CODE.__getitem__, rows["status"]), np.uint8, len(params))
        stored = store_table(
            self._objects,
            self._job,
            self._attempt,
            "aggregates",
            {
                "param": columns.fixed(params, pa.int64()),
                "target": columns.words(rows["target"], pa.int8()),
                "status": columns.fixed(codes, pa.uint8()),
                "n_succeeded": columns.fixed(np.array(rows["n_succeeded"], np.int64), pa.int64()),
                "n_replicates": columns.fixed(np.array(rows["n_replicates"], np.int64), pa.int64()),
                "reason": columns.text(rows["reason"]),
                **body.columns,
            },
        )
        body.remove_spooled()
        return AggregateRef(
            attempt=self._attempt,
            name=stored.name,
            digest=stored.digest,
            n_bytes=stored.n_bytes,
            params=ranges_of(np.unique(params)).pairs,
            counts={str(status): n for status, n in counts.items()},
            inputs=tuple(inputs),
            pack=body.pack,
            pack_bytes=body.pack_bytes,
        )
