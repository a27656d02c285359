"""The frozen record of what a job is: ``study.json`` in storage. Read by driver and workers.

Parameters are not in it (``parameters.parquet`` holds them), nor is anything that is learned while running.
A job that was extended has another spec, in an object of its own, see `modelops.study.extension`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import msgspec

from modelops.errors import IntegrityError, RequestError, StudyDamagedError
from modelops.states import ReplicateStatus
from modelops.study.index_line import IndexLine
from modelops.study.quantities import LONGEST_S
from modelops.study.stopping import Until

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMAT = 4  # 2: its parameters are not in "parameters.parquet"; 3: it has "until"; 4: it has "pools"
WITH_UNTIL = 3
WITH_POOLS = 4
FIRST_PARAMETERS = "parameters.parquet"
ISOLATIONS = ("warm", "fork", "spawn")


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How often and when a replicate that did not succeed is tried again.

    ``max_retries``: attempts are at most 1 + max_retries. ``initial_delay``: seconds before the first
    retry. ``backoff``: factor on the delay for each further retry. ``max_delay``: seconds, upper bound
    of a delay. ``on``: the statuses that are retried.
    """

    max_retries: int = 5
    initial_delay: float = 30.0
    backoff: float = 1.0
    max_delay: float | None = None
    on: frozenset[ReplicateStatus] = frozenset({ReplicateStatus.CRASHED})

    def delay_s(self, failed_attempts: int) -> float:
        """Return the seconds to wait after this many failed attempts (1 or more); never more than `LONGEST_S`."""
        longest = LONGEST_S if self.max_delay is None else min(self.max_delay, LONGEST_S)
        if not self.initial_delay:
            return 0.0
        try:
            return min(self.initial_delay * self.backoff ** (failed_attempts - 1), longest)
        except OverflowError:  # a factor of 2 is beyond all floats after 1,024 attempts
            return longest


NO_RETRY = RetryPolicy(max_retries=0)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one replicate may use. None means unlimited."""

    replicate_timeout_s: float | None = None
    memory_bytes: int | None = None
    threads: int = 1


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides the results of a job, except its parameters and its lock.

    ``model`` and ``aggregates`` are entry points as the bundle writes them. ``seeds``: explicit seeds, one
    per replicate number, or None, then seeds derive from ``study_seed``. ``min_success``: a float is a
    fraction of the replicates of a parameter set, an int a count. ``parameters``: the object below the job's
    folder that holds its parameter sets. ``until``: a parameter set gets no more replicates than this asks for; the
    line has its ``max`` of each. ``pools``: where it may run, see `asked_pools`; left out of the record of a job that
    may run everywhere.
    """

    format: int = 1
    name: str
    bundle: str
    bundle_name: str
    model: str
    aggregates: tuple[str, ...] = ()
    line: IndexLine
    study_seed: int = 0
    seeds: tuple[int, ...] | None = None
    common_random_numbers: bool = False
    isolation: str = "warm"
    limits: Limits = Limits()
    timeout_s: float | None = None
    min_success: float | int = 1.0
    retry: RetryPolicy = NO_RETRY
    fail_fast: bool = True
    max_failures: int | None = None
    parameters: str = FIRST_PARAMETERS
    until: Until | None = None
    pools: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET

    @property
    def asked_pools(self) -> tuple[str, ...]:
        """The pools on whose workers alone it runs, as the modeler wrote them; none: it runs everywhere."""
        return () if self.pools is msgspec.UNSET else self.pools

    def needed(self, n_replicates: int) -> int:
        """Return how many of ``n_replicates`` must succeed for an aggregate to run (at least 1)."""
        if isinstance(self.min_success, int):
            return self.min_success
        return max(1, math.ceil(self.min_success * n_replicates - 1e-9))


class _Head(msgspec.Struct):
    """The part of a spec that every version can read."""

    format: int = 0


def encode_spec(spec: JobSpec) -> bytes:
    """Return ``study.json``. JSON holds no number that is not finite, nor text that is not Unicode: neither is written.

    Raises
    ------
    RequestError
        A number is not finite, and its key is named; or a text is not Unicode.
    """
    for key, value in _numbers(msgspec.to_builtins(spec), ""):
        if not math.isfinite(value):
            raise RequestError(f"{key} = {value!r} of the study must be a finite number, or left out")
    try:
        return msgspec.json.encode(spec)
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{error.object!r} of the study must be text that UTF-8 can hold; write it anew"
        ) from error


def _numbers(value: object, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}" if key else str(name))


def is_newer(data: bytes) -> bool:
    """Say whether a newer ModelOps wrote this."""
    try:
        return msgspec.json.decode(data, type=_Head).format > FORMAT
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False


def unreadable(data: bytes) -> str:
    """Say why this version cannot read a recorded ``study.json``, and what to do; empty if it can.

    One job whose study cannot be read must not keep anybody from the others: whoever walks over jobs asks first.
    """
    return read_or_why(data)[1]


def read_or_why(data: bytes) -> tuple[JobSpec | None, str]:
    """Read a recorded ``study.json``; if this version cannot, return what `unreadable` says in its place."""
    try:
        return recorded_spec(data), ""
    except (StudyDamagedError, RequestError) as error:
        return None, str(error)


def recorded_spec(data: bytes, job: str = "") -> JobSpec:
    """Read the study that the database has of a job; what is wrong with it names the job, and says what to do.

    Raises
    ------
    StudyDamagedError
        These bytes are no study.
    RequestError
        A newer ModelOps wrote it.
    """
    which = f"job {job}" if job else "this job"
    try:
        return _decoded(data, which)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise StudyDamagedError(
            f"the study of {which}, recorded in the database, is damaged: {e}; put back a backup of the database, or "
            "submit the study again"
        ) from e


def decode_spec(data: bytes) -> JobSpec:
    """Read a stored ``study.json``; a newer format is refused with a sentence.

    Raises
    ------
    IntegrityError
        These bytes are no study.
    RequestError
        A newer ModelOps wrote it.
    """
    try:
        return _decoded(data, "this job")
    except (msgspec.DecodeError, UnicodeDecodeError) as e:  # ValidationError is a DecodeError
        raise IntegrityError(f"a job's study.json is damaged: {e}") from e


def _decoded(data: bytes, which: str) -> JobSpec:
    found = (_small if len(data) <= SMALL_BYTES else _large)(data)
    if isinstance(found, int):
        raise RequestError(
            f"{which} was written by a newer ModelOps (study format {found}, this one reads "
            f"up to {FORMAT}); upgrade modelops"
        )
    return found


def _parsed(data: bytes) -> JobSpec | int:
    """Return the study, or its format if that is newer."""
    form = msgspec.json.decode(data, type=_Head).format
    return form if form > FORMAT else msgspec.json.decode(data, type=JobSpec)


# Of a job that goes on the same bytes are read again and again; a list of a million seeds is 16 MB of them.
SMALL_BYTES: Final = 64 << 10
_small = lru_cache(maxsize=256)(_parsed)
_large = lru_cache(maxsize=4)(_parsed)
