"""Rows of the aggregates' table: one per parameter set, from one stored row per parameter set and target."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import pyarrow as pa

from modelops.states import AggregateStatus, ReplicateStatus
from modelops.store import columns
from modelops.store.aggregate_segments import AGGREGATE_OUTCOMES
from modelops.store.gather import Cover, Stored, cells_of, first_weight, held_rows
from modelops.store.order import places
from modelops.store.segment_table import OutputsColumn, read_aggregates
from modelops.store.segments import job_folder
from modelops.store.view_writer import ROW_GROUP, Group, rows_at_once
from modelops.store.views import Cells, column_names
from modelops.study.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy.typing as npt

    from modelops.store.contents import JobContents
    from modelops.worker.messages import AggregateRef

_CODE: Final = {status: code for code, status in enumerate(AGGREGATE_OUTCOMES)}
_ABSENT: Final = -1
OF_ROW_BYTES: Final = 100  # that a row takes beside its outputs
_WORST_FIRST: Final = (AggregateStatus.FAILED, AggregateStatus.SKIPPED, AggregateStatus.NOT_RUN)


class _Loaded(NamedTuple):
    """One target's rows of an aggregate segment, by parameter set."""

    stored: Stored
    status: npt.NDArray[np.uint8]
    n_succeeded: npt.NDArray[np.int64]
    n_replicates: npt.NDArray[np.int64]
    reason: pa.Array
    error: pa.Array


class AggregateRows:
    """The aggregates of a job as groups of rows, and the order of their outputs."""

    def __init__(self, contents: JobContents) -> None:
        self._contents = contents
        self._prefixes = target_prefixes(contents.spec.aggregates)
        self._first: dict[str, list[str]] = {}
        types = contents.view.types()
        before = [pa.field("param", pa.int64()), pa.field("param_id", pa.string())]
        after = [
            pa.field("status", pa.string()),
            pa.field("n_succeeded", pa.int64()),
            pa.field("n_replicates", pa.int64()),
            pa.field("reason", pa.string()),
        ]
        self._names = column_names(types, [f.name for f in before + after], "parameter.")
        self.fields = [*before, *(pa.field(self._names[n], t) for n, t in types.items()), *after]

    def order(self, found: Iterable[str]) -> list[str]:
        """Sort outputs: by target as in the study; then as the first succeeded row has them; then by name."""
        found = set(found)
        out: list[str] = []
        for prefix in self._prefixes.values():
            first = [name for name in self._first.get(prefix, ()) if name in found]
            of_target = {name for name in found - set(out) if name.startswith(prefix)}
            out += first + sorted(of_target - set(first))
        return out

    def groups(self) -> Iterator[Group]:
        """Yield the rows, in order of parameter sets; none if the job has no aggregate."""
        contents, n_params = self._contents, self._contents.spec.line.n_params
        covers = {
            target: Cover(
                [ref.params for ref in contents.aggregates],
                lambda i, target=target: self._load(contents.aggregates[i], target),  # type: ignore[misc]
                lambda loaded: loaded.stored.n_bytes + OF_ROW_BYTES * len(loaded.status),
            )
            for target in self._prefixes
        }
        first = np.arange(min(n_params, ROW_GROUP), dtype=np.int64)
        size = rows_at_once(n_params, lambda: sum(first_weight(cover, first) for cover in covers.values()))
        for lo in range(0, n_params if covers else 0, size):
            yield self._group(np.arange(lo, min(lo + size, n_params), dtype=np.int64), covers)

    def _group(self, params: npt.NDArray[np.int64], covers: dict[str, Cover[_Loaded]]) -> Group:
        contents, n = self._contents, len(params)
        codes = np.full((len(covers), n), _ABSENT, np.int64)
        n_succeeded, known = np.zeros(n, np.int64), np.zeros(n, np.bool_)
        n_replicates = _replicates_of(contents, params)
        reasons: defaultdict[int, list[str]] = defaultdict(list)
        cells: dict[str, Cells] = {}
        dropped: defaultdict[str, set[str]] = defaultdict(set)
        for nth, (target, prefix) in enumerate(self._prefixes.items()):
            pieces, first_row, first = [], n, None
            for loaded, at in covers[target].find(params):
                of, rows = held_rows(loaded.stored.key, params, at)
                codes[nth, rows] = loaded.status[of]
                n_succeeded[rows], n_replicates[rows] = loaded.n_succeeded[of], loaded.n_replicates[of]
                known[rows] = True
                pieces.append(loaded.stored.pick(of, rows))
                good = np.flatnonzero(loaded.status[of] == _CODE[AggregateStatus.SUCCEEDED])
                if len(good) and rows[good[0]] < first_row:
                    first_row, first = int(rows[good[0]]), loaded.stored.names_of(int(of[good[0]]))
                for i in np.flatnonzero(loaded.status[of] != _CODE[AggregateStatus.SUCCEEDED]).tolist():
                    said = _explanation(loaded, int(of[i]))
                    reasons[int(rows[i])] += [f"{prefix.removesuffix('.')}: {said}" if prefix else said]
                for name, labels in loaded.stored.labels.items():
                    dropped[prefix + name] |= labels
            cells |= {prefix + name: found for name, found in cells_of(pieces).items()}
            if first is not None:
                self._first.setdefault(prefix, [prefix + name for name in first])
        ids, parameters = contents.view.read(int(params[0]), int(params[-1]) + 1)
        base = {
            "param": columns.fixed(params, pa.int64()),
            "param_id": ids,
            **{self._names[name]: column for name, column in parameters.items()},
            "status": _statuses(codes, contents.rest),
            "n_succeeded": columns.fixed(n_succeeded, pa.int64(), known),
            "n_replicates": columns.fixed(n_replicates, pa.int64()),
            "reason": columns.text(["; ".join(reasons[i]) if i in reasons else None for i in range(n)])
            if reasons
            else pa.nulls(n, pa.string()),
        }
        return Group(base, cells, dropped, None)

    def _load(self, ref: AggregateRef, target: str) -> _Loaded:
        contents = self._contents
        table = read_aggregates(contents.objects, contents.job, ref).combine_chunks()
        names = table["target"].chunk(0)
        words = names.dictionary.to_pylist()
        of_target = np.array([word == target for word in words], np.bool_)[
            columns.fixed_values(names.indices)
        ]
        table = table.take(columns.fixed(np.flatnonzero(of_target), pa.int64())).combine_chunks()
        status, param, n_succeeded, n_replicates = (
            columns.fixed_values(columns.only_chunk(table, name))
            for name in ("status", "param", "n_succeeded", "n_replicates")
        )
        pack = f"{job_folder(contents.job)}/{ref.pack}"
        stored = Stored(param, status == _CODE[AggregateStatus.SUCCEEDED], OutputsColumn(table, pack))
        return _Loaded(stored, status, n_succeeded, n_replicates, table["reason"], table["error"])


def _statuses(codes: npt.NDArray[np.int64], rest: ReplicateStatus) -> pa.Array:
    """Join the targets' statuses by parameter set: the worst one; absent ones may come, or did not run."""
    absent = str(ReplicateStatus.PENDING if rest == ReplicateStatus.PENDING else AggregateStatus.NOT_RUN)
    words = [str(AggregateStatus.SUCCEEDED), absent, *map(str, reversed(_WORST_FIRST))]
    out = np.zeros(codes.shape[1], np.int64)
    out[(codes == _ABSENT).any(axis=0)] = 1
    for word, status in enumerate(reversed(_WORST_FIRST), 2):
        out[(codes == _CODE[status]).any(axis=0)] = word
    return columns.text(words).take(columns.fixed(out, pa.int64()))


def _explanation(loaded: _Loaded, row: int) -> str:
    said, error = loaded.reason[row].as_py(), loaded.error[row].as_py()
    if said or error is None:
        return said or str(AGGREGATE_OUTCOMES[loaded.status[row]])
    return f"{error['type']}: {error['message']}"


def _replicates_of(contents: JobContents, params: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    n = np.zeros(len(params), np.int64)  # they follow one another
    mine = contents.spec.line.of_params(int(params[0]), int(params[-1]) + 1)
    for b in contents.spec.line.blocks:
        n[(params >= b.p0) & (params < b.p0 + b.n_params)] += b.n_replicates
    for ref in contents.segments:
        if ReplicateStatus.NOT_NEEDED in ref.counts:
            for lo, hi in (Ranges(ref.ranges) & mine).pairs:
                of = places(contents.spec.line, np.arange(lo, hi)).param - params[0]
                n -= np.bincount(of, minlength=len(n))
    return n


def target_prefixes(targets: tuple[str, ...]) -> dict[str, str]:
    """Return what goes before the outputs of each target: nothing if there is one, else its function."""
    if len(targets) == 1:
        return {targets[0]: ""}
    functions = {target: re.split("[:/]", target)[-1] for target in targets}
    often = Counter(functions.values())
    return {t: (name if often[name] == 1 else t) + "." for t, name in functions.items()}
