"""What goes into a pool of runners and what comes out: plain frozen values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from modelops.rpc import ReplicateSet, ReplicateTable
from modelops.states import ReplicateStatus
from modelops.study.ids import ParamId
from modelops.study.seeds import entropy_key

AnySet: TypeAlias = ReplicateSet | ReplicateTable

LogSink = Callable[[int | None, bytes], None]
"""Takes what was printed: ``(index, text)``, in order; None: outside of any replicate (imports)."""


@dataclass(frozen=True)
class RunnerSpec:
    """What a runner is: two chunks with equal specs may share a warm process.

    ``python``: interpreter of the environment. ``environment_dir``: its prefix; None: whatever prefix
    ``python`` has. ``snapshot``: the read-only folder of the bundle. ``isolation``: ``warm``, ``fork`` or
    ``spawn``. ``wire``: the bundle uses the wire convention. ``env``: further variables. ``pycache``: folder
    for compiled modules, since the snapshot takes none. ``python_version``: X.Y.Z to insist on, if known.
    ``incarnation``: differs when the environment or the snapshot was made anew in the same place, so that no
    process that has seen the old one is used for it.
    """

    python: str
    environment_key: str
    environment_dir: str | None
    bundle_digest: str
    snapshot: str
    isolation: str
    memory_bytes: int | None
    replicate_timeout_s: float | None
    threads: int = 1
    wire: bool = False
    env: tuple[tuple[str, str], ...] = ()
    pycache: str | None = None
    python_version: str | None = None
    incarnation: str = ""


def part(one: AnySet, lo: int, hi: int) -> list[AnySet]:
    """Return those of its replicates at the positions ``lo <= i < hi``; of a table, sets at both edges may be cut."""
    if isinstance(one, ReplicateSet):
        cut = {"index": one.index + lo, "replicate": one.replicate + lo, "seeds": one.seeds[lo:hi]}
        return [msgspec.structs.replace(one, **cut)] if lo < hi else []
    parts: list[AnySet] = []
    for start, end in runs(one.each, lo, hi):
        nth, within = divmod(start, one.each)
        last = -(-end // one.each)
        parts.append(
            msgspec.structs.replace(
                one,
                each=min(one.each, end - start),
                params=listed(one.each_params()[nth:last]),
                param=one.param + nth,
                index=one.index + start,
                replicate=one.replicate + within,
                seeds=one.seeds[start:end],
                param_ids=one.param_ids and one.param_ids[32 * nth : 32 * last],
            )
        )
    return parts


def runs(each: int, lo: int, hi: int) -> Iterator[tuple[int, int]]:
    """Cut ``lo <= i < hi`` of sets of ``each`` into at most three runs: of whole sets, or a part of one."""
    while lo < hi:
        nth, within = divmod(lo, each)
        n_whole = 0 if within else (hi - lo) // each
        end = lo + n_whole * each if n_whole else min(hi, (nth + 1) * each)
        yield lo, end
        lo = end


def listed(params: Iterable[bytes | msgspec.Raw]) -> msgspec.Raw:
    """Return JSON values as one array."""
    return msgspec.Raw(b"[%b]" % b",".join(params))


def nth_set(one: ReplicateTable, nth: int, params: msgspec.Raw | None = None) -> ReplicateSet:
    """Return one of the sets of a table by itself. ``params``: its own, if they are known."""
    param_id = one.param_ids and ParamId(one.param_ids[32 * nth : 32 * (nth + 1)])
    return ReplicateSet(
        params=one.each_params()[nth] if params is None else params,
        param=one.param + nth,
        index=one.index + nth * one.each,
        replicate=one.replicate,
        seeds=one.seeds[nth * one.each : (nth + 1) * one.each],
        entropy_key=entropy_key(one.study_seed, param_id or None).hex(),
    )


def after(sets: list[AnySet], n: int) -> list[AnySet]:
    """Return what is left of a chunk behind its first ``n`` replicates."""
    for i, one in enumerate(sets):
        if n < len(one.seeds):
            return [*part(one, n, len(one.seeds)), *sets[i + 1 :]]
        n -= len(one.seeds)
    return []


def one_by_one(sets: Sequence[AnySet]) -> list[ReplicateSet]:
    """Return the same without tables."""
    found: list[ReplicateSet] = []
    for one in sets:
        if isinstance(one, ReplicateTable):
            found += [nth_set(one, nth, params) for nth, params in enumerate(one.each_params())]
        else:
            found.append(one)
    return found


def indices(sets: Sequence[AnySet]) -> list[int]:
    """Return all indices of a chunk, in order."""
    return [index for one in sets for index in range(one.index, one.index + len(one.seeds))]


class FileSlice(msgspec.Struct, frozen=True):
    """Bytes of an output that lie in a file (a pack)."""

    path: str
    offset: int
    bytes: int


class SpooledFile(msgspec.Struct, frozen=True):
    """A large output, written by the runner to a file that now belongs to whoever holds this.

    ``stamp``: its times of modification and of change when the runner had finished it, in nanoseconds, if it told.
    """

    path: str
    bytes: int
    sha256: str
    stamp: tuple[int, int] | None = None


Output: TypeAlias = tuple[str, str, bytes | SpooledFile]
"""One output: its name, its kind (docs/reference/values.md) and its bytes, or the file that holds them.

With kind ``json`` the bytes are the tagged JSON itself. A plain tuple: there are many of them.
"""


class ReplicateError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a replicate (or an aggregate) did not succeed.

    ``exit``: as ``Popen`` reports it, None if no process died. ``file``, ``line``: the innermost frame that
    lies in the bundle. ``fingerprint``: equal for errors of one type at one place.
    """

    type: str
    message: str
    traceback: str = ""
    stderr: str = ""
    fingerprint: str = ""
    exit: int | None = None
    file: str = ""
    line: int = 0
    missing_module: str | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How one replicate ended.

    ``returned_dict``: the model returned a dict (otherwise the only output is named ``value``).
    ``started_at``: Unix seconds. ``max_rss_bytes``: highest memory of its process up to its end, where known
    (read at most a few times per second; None for short replicates before the first reading).
    """

    index: int
    status: ReplicateStatus
    returned_dict: bool = True
    outputs: tuple[Output, ...] = ()
    error: ReplicateError | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    max_rss_bytes: int | None = None
    started_at: float = 0.0


class FloatOutcomes(msgspec.Struct, frozen=True, kw_only=True):
    """Consecutive replicates that succeeded and returned a dict of floats, as columns.

    ``values``: 8 bytes for each name of each replicate, IEEE 754, little-endian. The rest as in `Outcome`.
    """

    names: tuple[str, ...]
    indices: npt.NDArray[np.int64]
    values: bytes
    seconds: npt.NDArray[np.float64]
    cpu_seconds: npt.NDArray[np.float64]
    started_at: npt.NDArray[np.float64]
    max_rss_bytes: int | None = None

    def of(self, positions: Sequence[int]) -> FloatOutcomes:
        """Return those at these positions."""
        values = np.frombuffer(self.values, np.uint64).reshape(len(self.indices), -1)
        return msgspec.structs.replace(
            self,
            indices=self.indices[positions],
            values=values[positions].tobytes(),
            seconds=self.seconds[positions],
            cpu_seconds=self.cpu_seconds[positions],
            started_at=self.started_at[positions],
        )


class Row(msgspec.Struct, frozen=True):
    """One succeeded replicate as an aggregate sees it; inline bytes, or where they lie."""

    index: int
    returned_dict: bool
    outputs: Sequence[tuple[str, str, bytes | SpooledFile | FileSlice]]


class AggregateOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How one aggregate ended; ``status`` is one of `modelops.states.OUTCOMES`.

    ``incremental``: it was fed replicate by replicate, and holds no list of them.
    """

    status: ReplicateStatus
    returned_dict: bool = True
    outputs: tuple[Output, ...] = ()
    error: ReplicateError | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    stopped: bool = False
    incremental: bool = False


class RunEnd(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a chunk: the indices that have no outcome because the run was stopped, in order."""

    unstarted: tuple[int, ...] = ()

    @property
    def stopped(self) -> bool:
        """Whether anything was left."""
        return bool(self.unstarted)


def fingerprint(error_type: str, place: str) -> str:
    """Return a short hash of an error's type and place (``file:line``, or how the process ended)."""
    return hashlib.blake2b(f"{error_type}\0{place}".encode("utf-8", "replace"), digest_size=8).hexdigest()
