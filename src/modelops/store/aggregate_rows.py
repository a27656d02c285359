"""Rows of the aggregates' table: one per parameter set, from one stored row per parameter set and target."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import pyarrow as pa

from modelops.states import AggregateStatus, ReplicateStatus
from modelops.store import columns
from modelops.store.gather import Cover, Stored, cells_of
from modelops.store.segment_table import OutputsColumn, read_aggregates
from modelops.store.segments import AGGREGATE_OUTCOMES, job_folder
from modelops.store.view_writer import ROW_GROUP, Group
from modelops.store.views import Cells, column_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy.typing as npt

    from modelops.store.contents import JobContents
    from modelops.worker.messages import AggregateRef

_CODE: Final = {status: code for code, status in enumerate(AGGREGATE_OUTCOMES)}
_ABSENT: Final = -1
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
        self._prefixes = _prefixes(contents.spec.aggregates)
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
                lambda _: 1 << 20,
            )
            for target in self._prefixes
        }
        for lo in range(0, n_params if covers else 0, ROW_GROUP):
            yield self._group(np.arange(lo, min(lo + ROW_GROUP, n_params), dtype=np.int64), covers)

    def _group(self, params: npt.NDArray[np.int64], covers: dict[str, Cover[_Loaded]]) -> Group:
        n = len(params)
        codes = np.full((len(covers), n), _ABSENT, np.int64)
        n_succeeded, known = np.zeros(n, np.int64), np.zeros(n, np.bool_)
        n_replicates = _replicates_of(self._contents, params)
        reasons: defaultdict[int, list[str]] = defaultdict(list)
        cells: dict[str, Cells] = {}
        dropped: defaultdict[str, set[str]] = defaultdict(set)
        for nth, (target, prefix) in enumerate(self._prefixes.items()):
            pieces = []
            for loaded, at in covers[target].find(params):
                of = np.searchsorted(loaded.stored.key, params[at])
                held = (of < len(loaded.stored.key)) & (
                    loaded.stored.key[np.minimum(of, len(loaded.stored.key) - 1)] == params[at]
                )
                of, rows = of[held], at[held]
                codes[nth, rows] = loaded.status[of]
                n_succeeded[rows], n_replicates[rows] = loaded.n_succeeded[of], loaded.n_replicates[of]
                known[rows] = True
                pieces.append(loaded.stored.pick(of, rows))
                self._explain(loaded, of, rows, prefix, reasons)
                for name, labels in loaded.stored.labels.items():
                    dropped[prefix + name] |= labels
                good = np.flatnonzero(loaded.status[of] == _CODE[AggregateStatus.SUCCEEDED])
                if len(good) and prefix not in self._first and rows[good[0]] == _first_succeeded(codes[nth]):
                    names = loaded.stored.names_of(int(of[good[0]]))
                    firsts = (rows[good[0]], [prefix + name for name in names])
                    self._candidates.append(firsts)
            cells |= {prefix + name: c for name, c in cells_of(pieces).items()}
        return Group(self._base(params, codes, n_succeeded, known, n_replicates, reasons), cells, dropped, None)
