"""Rows of the replicates' table: every index of the line, in result order, with what is known of it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa

from modelops.states import OUTCOMES, STORED, ReplicateStatus
from modelops.store import columns
from modelops.store.gather import Cover, Stored, StoredFloats, cells_of, first_weight
from modelops.store.order import ResultOrder, Rows
from modelops.store.segment_table import OutputsColumn, SegmentTable
from modelops.store.view_writer import ROW_GROUP, Group, rows_at_once
from modelops.store.views import column_names
from modelops.study.seeds import seed_key, seeds_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from modelops.store.contents import JobContents
    from modelops.study.ranges import Ranges
    from modelops.study.spec import JobSpec

_SUCCEEDED: Final = OUTCOMES.index(ReplicateStatus.SUCCEEDED)


def replicate_fields(contents: JobContents) -> tuple[list[pa.Field], dict[str, str]]:
    """Return the columns that every row of a replicate has, and the column of each parameter."""
    fixed = [
        pa.field("param", pa.int64()),
        pa.field("param_id", pa.string()),
        pa.field("replicate", pa.int64()),
        pa.field("seed", pa.int64()),
        pa.field("status", pa.string()),
    ]
    types = contents.view.types()
    names = column_names(types, [f.name for f in fixed], "parameter.")
    return [*fixed, *(pa.field(names[name], types[name]) for name in types)], names


def base_columns(contents: JobContents, rows: Rows, status: pa.Array) -> dict[str, pa.Array]:
    """Return the columns of `replicate_fields` for some rows."""
    _, names = replicate_fields(contents)
    lo, hi = (int(rows.param.min()), int(rows.param.max()) + 1) if len(rows.param) else (0, 0)
    ids, parameters = contents.view.read(lo, hi)
    nth = rows.param - lo
    at = columns.fixed(nth, pa.int64())
    return {
        "param": columns.fixed(rows.param, pa.int64()),
        "param_id": ids.take(at),
        "replicate": columns.fixed(rows.replicate, pa.int64()),
        "seed": row_seeds(
            contents.spec, lambda: contents.view.keys(contents.spec.study_seed, lo, hi), nth, rows.replicate
        ),
        "status": status,
        **{names[name]: column.take(at) for name, column in parameters.items()},
    }


def row_seeds(
    spec: JobSpec,
    keys_of_sets: Callable[[], npt.NDArray[np.uint32] | None],
    nth: npt.NDArray[np.int64],
    replicate: npt.NDArray[np.int64],
) -> pa.Array:
    """Return the seed of each row: ``nth`` is the position of its parameter set in ``keys_of_sets``, see `seed_keys`.

    They are null where they depend on keys and there are none.
    """
    if spec.seeds is not None:
        seeds = np.array(spec.seeds, np.int64)[replicate]
    elif spec.common_random_numbers:
        key = seed_key(spec.study_seed, None)
        seeds = seeds_at(np.uint32(key.a), np.uint32(key.b), replicate)
    elif (keys := keys_of_sets()) is None:
        return pa.nulls(len(replicate), pa.int64())
    else:
        seeds = seeds_at(keys[nth, 0], keys[nth, 1], replicate)
    return columns.fixed(seeds, pa.int64())


def replicate_statuses(contents: JobContents) -> tuple[list[str], int, int]:
    """Return the words of the status column, and the codes of ``rest`` and ``running``; outcomes first."""
    return [*STORED, contents.rest, ReplicateStatus.RUNNING], len(STORED), len(STORED) + 1


def status_column(contents: JobContents, codes: npt.NDArray[np.int64]) -> pa.Array:
    """Return the statuses as text."""
    words, _, _ = replicate_statuses(contents)
    return columns.text([str(w) for w in words]).take(columns.fixed(codes, pa.int64()))


def in_ranges(ranges: Ranges, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Say of each index whether it is in the set."""
    if not ranges:
        return np.zeros(len(indices), np.bool_)
    edges = np.array(ranges.pairs, np.int64).ravel()
    return np.asarray(np.searchsorted(edges, indices, side="right") % 2 == 1)


def replicate_groups(contents: JobContents, progress: Callable[[int, int], None] | None) -> Iterator[Group]:
    """Yield the rows of the line in result order, a row group at a time; committed segments are verified.

    That is every row, but for those of `JobContents.no_rows`.
    """
    order = ResultOrder(contents.spec.line)
    shown = order.numbers_of(contents.spec.line.all() - contents.no_rows)
    n_done = 0
    cover: Cover[_Loaded] = Cover(
        [ref.ranges for ref in contents.segments],
        lambda i: _Loaded(contents.read(i)),
        lambda loaded: loaded.n_bytes,
    )
    _, rest, running = replicate_statuses(contents)

    def weigh() -> int:
        return first_weight(cover, order.at(next(_in_groups(shown, ROW_GROUP))).index)

    for numbers in _in_groups(shown, rows_at_once(len(shown), weigh)):
        rows = order.at(numbers)
        codes = np.where(in_ranges(contents.running, rows.index), running, rest)
        pieces, first_at, first = [], len(codes), None
        dropped: defaultdict[str, set[str]] = defaultdict(set)
        for loaded, at in cover.find(rows.index):
            of = np.searchsorted(loaded.stored.key, rows.index[at])
            codes[at] = loaded.status[of]
            by_row = np.argsort(of, kind="stable")  # blocks may interleave on the line
            pieces.append(loaded.stored.pick(of[by_row], at[by_row]))
            good = np.flatnonzero(codes[at] == _SUCCEEDED)
            if len(good) and at[good[0]] < first_at:
                first_at, first = int(at[good[0]]), loaded.stored.names_of(int(of[good[0]]))
            for name, labels in loaded.stored.labels.items():
                dropped[name] |= labels
        yield Group(
            base_columns(contents, rows, status_column(contents, codes)), cells_of(pieces), dropped, first
        )
        n_done += len(numbers)
        if progress is not None:
            progress(n_done, len(shown))


def _in_groups(numbers: Ranges, size: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield these, ascending, ``size`` at a time."""
    held: list[npt.NDArray[np.int64]] = []
    n = 0
    for start, hi in numbers.pairs:
        lo = start
        while lo < hi:
            end = min(hi, lo + size - n)
            held.append(np.arange(lo, end, dtype=np.int64))
            n, lo = n + end - lo, end
            if n == size:
                yield np.concatenate(held)
                held, n = [], 0
    if held:
        yield np.concatenate(held)


class _Loaded:
    def __init__(self, segment: SegmentTable) -> None:
        self.status = segment.status
        succeeded, floats = segment.status == _SUCCEEDED, segment.floats
        self.stored = (
            StoredFloats(segment.index, succeeded, floats)
            if floats is not None
            else Stored(segment.index, succeeded, OutputsColumn(segment.table, segment.pack))
        )
        self.n_bytes = segment.table.nbytes + self.stored.n_bytes
