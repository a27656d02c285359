"""The routes of what a job has brought: tables, outputs, aggregates, logs, files."""

from __future__ import annotations

import struct
from typing import IO, TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
from starlette.responses import Response

from modelops.errors import NotFoundError, RequestError
from modelops.server.copying import FilePage
from modelops.server.http.api import json_response
from modelops.server.http.files import send_object, send_written
from modelops.server.http.jobs import JobPath, JobText, param_of
from modelops.server.http.operations import BINARY, Answer, Operation, Place, at
from modelops.store.results import stream_table
from modelops.store.segments import PackSlice

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelops.server.http.api import Api
    from modelops.server.http.operations import Call
    from modelops.store import Objects
    from modelops.store.contents import JobContents
    from modelops.store.segment_table import StoredOutput

ARROW: Final = "application/vnd.apache.arrow.stream"
MSGPACK: Final = "application/msgpack"
TEXT: Final = "text/plain; charset=utf-8"
MAX_OUTPUT_BYTES: Final = 2**32 - 1  # of msgpack
_PARAM: Final = "^([0-9]{1,16}|[0-9a-f]{32})$"
ParamText = Annotated[str, at(Place.QUERY, "Ordinal or `param_id` of a parameter set.", pattern=_PARAM)]
Replicate = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table of a job."""

    job: JobText
    table: Annotated[
        Literal["replicates", "aggregates", "failures", "aggregate_failures", "attempts"],
        at(Place.PATH, "Which table."),
    ]


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """A replicate of a job, and one of its outputs."""

    job: JobText
    param: ParamText
    replicate: Annotated[int, at(Place.QUERY, "Number of the replicate.", ge=0, le=2**53)]
    name: Annotated[
        str | msgspec.UnsetType, at(Place.QUERY, "Name of an output; all when it is left out.")
    ] = msgspec.UNSET


class Aggregate(msgspec.Struct, frozen=True, kw_only=True):
    """An aggregate of a parameter set of a job."""

    job: JobText
    param: ParamText
    target: Annotated[
        str, at(Place.QUERY, "Entry point of the aggregate; may be left out when the job has one.")
    ] = ""


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """What was printed by a job, one of its parameter sets, or one replicate."""

    job: JobText
    param: ParamText = ""
    replicate: Annotated[
        Replicate | msgspec.UnsetType, at(Place.QUERY, "Number of the replicate; needs `param`.")
    ] = msgspec.UNSET


class Files(msgspec.Struct, frozen=True, kw_only=True):
    """A page of the files of a job."""

    job: JobText
    limit: Annotated[int, at(Place.QUERY, "How many at most.", ge=1, le=10_000)] = 1000
    cursor: Annotated[str, at(Place.QUERY, "`next` of the page before.", max_length=200)] = ""


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a job, or a part of it."""

    job: JobText
    name: Annotated[str, at(Place.PATH, "Name of the file, with its slashes.")]
    range: Annotated[str, at(Place.HEADER, "The part that is wanted (RFC 9110).")] = msgspec.field(
        name="Range", default=""
    )


async def table(api: Api, call: Call) -> Response:
    """Send a table as an Arrow IPC stream."""
    await api.quick(api.service.contents, call.given.job)

    def write(file: IO[bytes]) -> None:
        if api.service.write_finished(call.given.job, call.given.table, file):
            return

        def again(contents: JobContents) -> None:
            file.seek(0)
            file.truncate()
            stream_table(contents, call.given.table, file)

        api.service.answer(call.given.job, again)

    return await send_written(api, write, ARROW)


async def output(api: Api, call: Call) -> Response:
    """Send what a model returned for a replicate, as it is stored."""
    given = call.given
    name = None if given.name is msgspec.UNSET else given.name
    param, replicate = param_of(given.param), given.replicate
    return await _send_outputs(api, lambda: api.service.output(given.job, param, replicate, name))


async def aggregate(api: Api, call: Call) -> Response:
    """Send an aggregate of a parameter set, as it is stored."""
    given = call.given
    param, target = param_of(given.param), given.target or None
    return await _send_outputs(api, lambda: api.service.aggregate(given.job, param, target))


async def log(api: Api, call: Call) -> Response:
    """Send what the bundle printed."""
    given = call.given
    replicate = None if given.replicate is msgspec.UNSET else given.replicate
    if replicate is not None and not given.param:
        raise NotFoundError(
            "a replicate alone names nothing: give the parameter set that the replicate belongs to"
        )
    param = param_of(given.param) if given.param else None

    def write(file: IO[bytes]) -> None:
        file.writelines(
            t.encode("utf-8", "replace") for t in api.service.printed(given.job, param, replicate)
        )

    return await send_written(api, write, TEXT)


async def lock(api: Api, call: Call) -> Response:
    """Send the lock of a job's environment."""
    return Response(await api.stored(api.service.lock, call.given.job), media_type=TEXT)


async def files(api: Api, call: Call) -> Response:
    """List what may be copied."""
    given = call.given
    return json_response(await api.stored(api.service.files.page, given.job, given.cursor, given.limit))


async def file(api: Api, call: Call) -> Response:
    """Send a file, or a part of it."""
    name, found = await api.stored(api.service.files.one, call.given.job, call.given.name)
    return await send_object(
        api, call.request, api.service.objects, name, found.n_bytes, BINARY, found.sha256
    )


async def _send_outputs(api: Api, find: Callable[[], tuple[bool, list[StoredOutput]]]) -> Response:
    def write(into: IO[bytes]) -> None:
        returned_dict, outputs = find()
        for name, _, data in outputs:
            if isinstance(data, PackSlice) and data.length > MAX_OUTPUT_BYTES:
                raise RequestError(
                    f"the output {name!r} has {data.length} bytes, more than one answer can hold; copy the job's "
                    "files with 'modelops jobs sync' and read it there"
                )
        write_outputs(api.service.objects, returned_dict, outputs, into)

    return await send_written(api, write, MSGPACK)


def write_outputs(
    objects: Objects, returned_dict: bool, outputs: list[StoredOutput], file: IO[bytes]
) -> None:
    """Write msgpack ``{returned_dict, outputs: [[name, kind, bytes], ...]}``, large bytes piece by piece."""
    encode = msgspec.msgpack.encode
    file.write(b"\x82" + encode("returned_dict") + encode(returned_dict) + encode("outputs"))
    file.write(struct.pack(">BI", 0xDD, len(outputs)))
    for name, kind, data in outputs:
        n_bytes = data.length if isinstance(data, PackSlice) else len(data)
        file.write(b"\x93" + encode(name) + encode(kind) + struct.pack(">BI", 0xC6, n_bytes))
        file.writelines(data.pieces(objects) if isinstance(data, PackSlice) else (data,))


PART: Final = {
    200: Answer("The whole file.", None, BINARY, {"Accept-Ranges": "`bytes`."}),
    206: Answer("The part that was asked for.", None, BINARY, {"Content-Range": "Which part it is."}),
}
OPERATIONS: Final[tuple[Any, ...]] = (
    Operation(
        "GET", "/v1/jobs/{job}/tables/{table}", "get_table", "Read a table as an Arrow IPC stream.", table,
        {200: Answer("The table, from what is committed now.", None, ARROW)}, Table, problems=(404,),
    ),
    Operation(
        "GET", "/v1/jobs/{job}/output", "get_output", "Read what the model returned for a replicate.", output,
        {200: Answer("`{returned_dict: bool, outputs: [[name, kind, bytes], ...]}`.", None, MSGPACK)},
        Output, problems=(404, 422),
    ),
    Operation(
        "GET", "/v1/jobs/{job}/aggregate", "get_aggregate", "Read an aggregate of a parameter set.", aggregate,
        {200: Answer("As of an output.", None, MSGPACK)}, Aggregate, problems=(404, 422),
    ),
    Operation(
        "GET", "/v1/jobs/{job}/log", "get_log", "Read what the bundle printed.", log,
        {200: Answer("The text.", None, "text/plain")}, Log, problems=(404,),
    ),
    Operation(
        "GET", "/v1/jobs/{job}/lock", "get_lock", "Read the lock of a job's environment.", lock,
        {200: Answer("The lock.", None, "text/plain")}, JobPath, problems=(404,),
    ),
    Operation(
        "GET", "/v1/jobs/{job}/files", "list_files", "List the files of a job that are whole by now.", files,
        {200: Answer("A page of files.", FilePage)}, Files, problems=(404,),
    ),
    Operation(
        "GET", "/v1/jobs/{job}/files/{name:path}", "get_file", "Read a file of a job, or a part of it.", file,
        PART, File, problems=(404, 416),
    ),
)  # fmt: skip
