"""Every message of the runner protocol, typed. Reference: ``docs/reference/protocol.md``.

Outputs stay as the JSON they came in (`msgspec.Raw`), so a value is neither parsed nor written again on its
way from the runner to a segment.
"""

from __future__ import annotations

from binascii import a2b_base64
from typing import Any, ClassVar, Literal, TypeAlias

import msgspec

PROTOCOL = 1

Output: TypeAlias = tuple[str, str, msgspec.Raw]
"""Name, kind, and ``data`` as JSON: the tagged JSON itself, base64 text, or a file (`SpoolFile`)."""


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the params of a request or notification; ``METHOD`` is its name on the wire."""

    METHOD: ClassVar[str]


# --- what the runner is asked


class Initialize(Wire, frozen=True, kw_only=True):
    """The handshake. Paths are absolute; ``workdir``, ``tmpdir`` are empty and private to the process.

    ``sheet``: a descriptor that the runner holds, of memory that it may write outcomes to.
    """

    METHOD: ClassVar[str] = "initialize"
    bundle_digest: str
    snapshot: str
    workdir: str
    tmpdir: str
    spool: str
    marker: str
    isolation: str = "warm"
    inline_limit: int = 65_536
    preload: tuple[str, ...] = ()
    wire: bool = False
    sheet: int | msgspec.UnsetType = msgspec.UNSET
    protocol: int = PROTOCOL


class ReplicateSet(msgspec.Struct, frozen=True, kw_only=True):
    """Consecutive replicates of one parameter set. ``params``: tagged JSON of an object."""

    params: msgspec.Raw
    param: int
    index: int
    replicate: int
    seeds: tuple[int, ...]
    entropy_key: str


class ReplicateTable(msgspec.Struct, frozen=True, kw_only=True):
    """Consecutive parameter sets, with the same ``each`` consecutive replicates of each, in one piece.

    ``params``: a JSON array with a tagged object for each. ``seeds``: set by set. ``param_ids``: hexadecimal, 32 digits
    of each set; None: they have the random numbers of the study in common. ``param``, ``index``, ``replicate``: of the
    first.
    """

    each: int
    params: msgspec.Raw
    param: int
    index: int
    replicate: int
    seeds: tuple[int, ...]
    study_seed: int
    param_ids: str | None

    @property
    def n_sets(self) -> int:
        """How many parameter sets there are."""
        return len(self.seeds) // self.each

    def each_params(self) -> list[msgspec.Raw]:
        """Return the tagged object of each."""
        return msgspec.json.decode(self.params, type=list[msgspec.Raw])


class ReplicatesRun(Wire, frozen=True, kw_only=True):
    """Run these replicates in order, those of ``tables`` behind those of ``sets``.

    ``floats``: outputs that are nothing else may come as `Floats`.
    """

    METHOD: ClassVar[str] = "replicates/run"
    entry: str
    sets: tuple[ReplicateSet, ...]
    tables: tuple[ReplicateTable, ...] | msgspec.UnsetType = msgspec.UNSET
    wire: bool = False
    checkpoint_root: str | None = None
    replicate_timeout_s: float | None = None
    floats: Literal[True] | msgspec.UnsetType = msgspec.UNSET


class AggregateStart(Wire, frozen=True, kw_only=True):
    """Begin an aggregate; ``id`` is the parent's name for it until `AggregateFinish`."""

    METHOD: ClassVar[str] = "aggregate/start"
    id: int
    entry: str
    params: msgspec.Raw
    param: int
    n: int
    wire: bool = False
    target_data: msgspec.Raw = msgspec.Raw(b"null")


class AggregateAdd(Wire, frozen=True, kw_only=True):
    """Feed replicates, in order: (index, ``dict`` or ``value``, outputs). A notification."""

    METHOD: ClassVar[str] = "aggregate/add"
    id: int
    rows: tuple[tuple[int, str, tuple[Output, ...]], ...]


class AggregateTake(AggregateAdd, frozen=True, kw_only=True):
    """The same as a request: once it is answered, the files that its rows name are not read any more."""


class AggregateFinish(Wire, frozen=True, kw_only=True):
    """Ask for the result of an aggregate."""

    METHOD: ClassVar[str] = "aggregate/finish"
    id: int


class AggregateSet(msgspec.Struct, frozen=True, kw_only=True):
    """All succeeded replicates of one parameter set, in order.

    Either ``rows``, as in `AggregateAdd`; or ``names`` and ``floats``: the outputs of each are floats of these names,
    hexadecimal, 8 bytes each, IEEE 754, little-endian.
    """

    param: int
    params: msgspec.Raw
    rows: tuple[tuple[int, str, tuple[Output, ...]], ...] | msgspec.UnsetType = msgspec.UNSET
    names: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    floats: str | msgspec.UnsetType = msgspec.UNSET


class AggregateTable(msgspec.Struct, frozen=True, kw_only=True):
    """Consecutive parameter sets whose succeeded replicates returned floats of the same names.

    ``param``: of the first set. ``counts``: how many replicates each has. ``floats``: as in an `AggregateSet`, of all.
    """

    param: int
    params: tuple[msgspec.Raw, ...]
    names: tuple[str, ...]
    counts: tuple[int, ...]
    floats: str


class AggregatesRun(Wire, frozen=True, kw_only=True):
    """Make the aggregates of these sets, or of those of a table, in order, up to the first one that fails."""

    METHOD: ClassVar[str] = "aggregates/run"
    entry: str
    sets: tuple[AggregateSet, ...]
    table: AggregateTable | msgspec.UnsetType = msgspec.UNSET
    target_data: msgspec.Raw = msgspec.Raw(b"null")


class FunctionCall(Wire, frozen=True, kw_only=True):
    """Call a function of the bundle. ``args``: (kind, data) each."""

    METHOD: ClassVar[str] = "function/call"
    entry: str
    args: tuple[tuple[str, msgspec.Raw], ...] = ()
    cwd: str | None = None


class Shutdown(Wire, frozen=True, kw_only=True):
    """Ask the runner to exit with code 0."""

    METHOD: ClassVar[str] = "shutdown"


class Cancel(Wire, frozen=True, kw_only=True):
    """Ask that a request stop between two replicates. A notification."""

    METHOD: ClassVar[str] = "$/cancelRequest"
    id: int


# --- what the runner says


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What this runner offers. ``tables``: it takes `ReplicatesRun.tables` and `AggregatesRun.table`."""

    isolation: tuple[str, ...]
    aggregate_incremental: bool = False
    tables: bool = False
    fork_refused: str | None = None


class Initialized(msgspec.Struct, frozen=True, kw_only=True):
    """Result of `Initialize`: who answered."""

    protocol: int
    pid: int
    python: str
    implementation: str
    executable: str
    prefix: str
    platform: str
    bundle_digest: str
    capabilities: Capabilities


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """Result of `ReplicatesRun`."""

    finished: int
    stopped: bool


class AggregateResult(msgspec.Struct, frozen=True, kw_only=True):
    """Result of `AggregateFinish`. ``incremental``: it was fed replicate by replicate."""

    returned: Literal["dict", "value"]
    outputs: tuple[Output, ...]
    seconds: float
    cpu: float
    incremental: bool = False


class AggregateFinished(Wire, frozen=True, kw_only=True):
    """One aggregate of `AggregatesRun` is made."""

    METHOD: ClassVar[str] = "aggregate/finished"
    param: int
    returned: Literal["dict", "value"]
    outputs: tuple[Output, ...]
    seconds: float
    cpu: float


class AggregatesMade(Wire, frozen=True, kw_only=True):
    """Some aggregates of a table are made; ``param``: of the first.

    ``made``: of each whether it returned a dict, and outputs. Or each returned a dict of these ``names``, all values of
    which are inline JSON: ``data`` has those of the first, then those of the second.
    """

    METHOD: ClassVar[str] = "aggregates/made"
    param: int
    made: tuple[tuple[Literal["dict", "value"], tuple[Output, ...]], ...] = ()
    names: tuple[str, ...] = ()
    data: msgspec.Raw = msgspec.Raw(b"[]")


class FunctionResult(msgspec.Struct, frozen=True, kw_only=True):
    """Result of `FunctionCall`."""

    value: tuple[str, msgspec.Raw]


class ErrorObject(msgspec.Struct, frozen=True, kw_only=True):
    """What the bundle's code raised."""

    type: str
    message: str
    traceback: str = ""
    file: str = ""
    line: int = 0
    missing_module: str | None = None
    invalid_output: bool = False


class Finished(Wire, frozen=True, kw_only=True):
    """One replicate is done. ``exit``: the return code of a fork that died, as `Popen` reports it."""

    METHOD: ClassVar[str] = "replicate/finished"
    index: int
    status: Literal["succeeded", "failed", "invalid_output", "crashed", "timed_out"]
    returned: Literal["dict", "value"]
    outputs: tuple[Output, ...]
    seconds: float
    cpu: float
    error: ErrorObject | None = None
    exit: int | None = None


class Shape(Wire, frozen=True, kw_only=True):
    """The names of outputs that are floats, and the number that stands for them in this process."""

    METHOD: ClassVar[str] = "replicate/shape"
    shape: int
    names: tuple[str, ...]


class Floats(msgspec.Struct, frozen=True, array_like=True):
    """The params of `replicate/floats`: a succeeded replicate that returned a dict of floats.

    ``values``: hexadecimal, 8 bytes each, IEEE 754, little-endian, in the order of the names.
    """

    index: int
    shape: int
    values: str
    seconds: float
    cpu: float


class ProgressNote(Wire, frozen=True, kw_only=True):
    """The model reported how far it is. ``values``: tagged JSON of an object."""

    METHOD: ClassVar[str] = "context/progress"
    index: int
    fraction: float
    values: msgspec.Raw


# --- what the runner asks while a replicate runs; done and answered before the model goes on


class RestoreCheckpoint(Wire, frozen=True, kw_only=True):
    """Make the folder ``<index>`` below ``checkpoint_root``, with the last checkpoint of the replicate in it."""

    METHOD: ClassVar[str] = "context/restore"
    index: int


class KeepCheckpoint(Wire, frozen=True, kw_only=True):
    """Keep what lies in the folder ``<index>`` below ``checkpoint_root``."""

    METHOD: ClassVar[str] = "context/checkpoint"
    index: int


# --- outputs


class SpoolFile(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that lie in a file.

    ``offset`` is used on the way to a runner only, to point into a pack; ``stamp`` on the way from it: times of
    modification and of change, in nanoseconds, which the file has as long as nobody touches it.
    """

    path: str = msgspec.field(name="$file")
    bytes: int
    sha256: str
    offset: int = 0
    stamp: tuple[int, int] | msgspec.UnsetType = msgspec.UNSET


_SPOOL_FILE = msgspec.json.Decoder(SpoolFile)
_BASE64 = msgspec.json.Decoder(str)


def spool_file(data: msgspec.Raw) -> SpoolFile | None:
    """Return the file of an output, or None if its data is inline.

    No inline value begins like that: a key that begins with ``$`` is itself tagged.
    """
    head = bytes(memoryview(data)[:16]).translate(None, b" \t\r\n")
    return _SPOOL_FILE.decode(data) if head.startswith(b'{"$file"') else None


def decode_output(kind: str, data: msgspec.Raw) -> bytes:
    """Return the bytes of an inline output, as a segment stores them."""
    return bytes(data) if kind == "json" else a2b_base64(_BASE64.decode(data))


def encode_output(kind: str, data: bytes) -> msgspec.Raw:
    """Return stored bytes as the ``data`` of an inline output; the inverse of `decode_output`."""
    return msgspec.Raw(data if kind == "json" else msgspec.json.encode(data))


def json_value(raw: msgspec.Raw) -> Any:
    """Return the tree that raw JSON holds, tags and all."""
    return msgspec.json.decode(raw)
