"""Results of a job: tables of what is committed, during the job and after it, and the files at its end.

Everything is computed from committed segments, verified as they are read; see docs/reference/results.md.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from modelops.errors import IntegrityError, NotFoundError, StorageError
from modelops.garbage import give_back_now
from modelops.store.aggregate_failures import aggregate_failures
from modelops.store.aggregate_rows import AggregateRows
from modelops.store.attempts import write_attempts
from modelops.store.failures import failure_groups, failures_schema
from modelops.store.objects import IN_MEMORY_BYTES, pieces_of
from modelops.store.replicate_rows import replicate_fields, replicate_groups
from modelops.store.result_file import ResultFile
from modelops.store.segments import job_folder
from modelops.store.view_writer import ROW_GROUP, MemorySink, ParquetSink, StreamSink, write_view
from modelops.volumes import temporary_files_are

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from modelops.store.contents import JobContents
    from modelops.store.objects import Objects
    from modelops.study.ids import JobId


TABLES: Final = ("replicates", "aggregates", "failures", "aggregate_failures", "attempts")


def replicates_table(contents: JobContents) -> pa.Table:
    """Return one row per replicate, sorted by (parameter set, replicate)."""
    return _in_memory(lambda open_sink: _write_replicates(contents, open_sink, None))


def aggregates_table(contents: JobContents) -> pa.Table:
    """Return one row per parameter set, in order; no rows if the job has no aggregate."""
    return _in_memory(lambda open_sink: _write_aggregates(contents, open_sink))


def attempts_table(contents: JobContents) -> pa.Table:
    """Return one row per finished try at a replicate: when, how long, where. Never part of a result."""
    return _in_memory(lambda open_sink: write_attempts(contents, open_sink))


def stream_table(contents: JobContents, name: str, file: IO[bytes]) -> None:
    """Write a table as an Arrow IPC stream, in memory that does not grow with the job.

    Parameters
    ----------
    name
        One of `TABLES`.
    file
        Emptied first; must be able to seek.
    """
    sinks: list[StreamSink] = []

    def open_sink(schema: pa.Schema) -> StreamSink:
        sinks[:] = [StreamSink(file, schema)]
        return sinks[0]

    match name:
        case "replicates":
            _write_replicates(contents, open_sink, None)
        case "aggregates":
            _write_aggregates(contents, open_sink)
        case "attempts":
            write_attempts(contents, open_sink)
        case "aggregate_failures":
            kinds = aggregate_failures(contents)
            open_sink(kinds.schema).write(kinds)
        case _:
            sink = open_sink(failures_schema(contents))
            for group in failure_groups(contents):
                sink.write(group)
    sinks[0].close()


def stream_result_file(objects: Objects, job: JobId, written: ResultFile, file: IO[bytes]) -> None:
    """Write a table as `stream_table` does, from a result file: many times faster than from what it was made from.

    Raises
    ------
    IntegrityError, NotFoundError
        The file is not as it was written, or gone; what ``file`` holds is of no use.
    """
    name = f"{job_folder(job)}/results/{written.name}"
    path = objects.local_path(name)
    with _opened(path) if path is not None else _fetched(objects, name) as source:
        digest = sha256()
        for piece in pieces_of(source):
            digest.update(piece)
        if digest.hexdigest() != written.sha256:
            raise IntegrityError(f"{name} is damaged: it is not what was written")
        source.seek(0)
        table = pq.ParquetFile(source)
        sink = StreamSink(file, table.schema_arrow)
        for group in range(table.num_row_groups):
            sink.write(table.read_row_group(group))
        sink.close()


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except FileNotFoundError as e:
        raise NotFoundError(f"there is no {path}") from e
    except OSError as e:
        raise StorageError(f"reading {path} failed: {e.strerror}") from e


def _fetched(objects: Objects, name: str) -> IO[bytes]:
    file = SpooledTemporaryFile(IN_MEMORY_BYTES)  # noqa: SIM115  the caller closes it
    file.writelines(objects.stream(name))
    return file


def finalize(
    contents: JobContents, *, progress: Callable[[int, int], None] | None = None
) -> tuple[ResultFile, ...]:
    """Write ``results/{replicates,aggregates,attempts}.parquet``, in memory that does not grow with the job.

    Parameters
    ----------
    progress
        Called with rows done and rows in all, after each row group of replicates.

    Returns
    -------
        What was written, for whoever wants to know later whether it is still that.

    Raises
    ------
    IntegrityError, NotFoundError
        A committed segment is damaged or gone; nothing was written.
    StorageError
        There is no room for them, where they are to be or in the folder of temporary files; nothing was written.
    """
    tables: dict[str, Callable[[Callable[[pa.Schema], ParquetSink]], None]] = {
        "replicates": lambda open_sink: _write_replicates(contents, open_sink, progress),
        "aggregates": lambda open_sink: _write_aggregates(contents, open_sink),
        "attempts": lambda open_sink: write_attempts(contents, open_sink),
    }
    with temporary_files_are(f"the result files of {contents.job}"), contextlib.ExitStack() as stack:
        files: dict[str, IO[bytes]] = {
            f"{name}.parquet": stack.enter_context(SpooledTemporaryFile(IN_MEMORY_BYTES)) for name in tables
        }
        beside = None
        if contents.spec.line.size > ROW_GROUP:  # of a smaller job it would take longer to begin with it
            # The attempts are read from other objects, and most of it is done outside of Python.
            other = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="modelops-attempts"))
            beside = other.submit(_pour, tables.pop("attempts"), files["attempts.parquet"], behind=False)
        for name, write in tables.items():
            _pour(write, files[f"{name}.parquet"])
            if beside is not None:
                give_back_now()
        if beside is not None:
            beside.result()
        written = tuple(_described(name, file) for name, file in files.items())
        folder = f"{job_folder(contents.job)}/results"
        contents.objects.replace_together(
            {f"{folder}/{name}": pieces_of(file) for name, file in files.items()},
            unknown=True,  # what is recorded of them is recorded afterwards
        )
    return written


def _in_memory(write: Callable[[Callable[[pa.Schema], MemorySink]], None]) -> pa.Table:
    sinks: list[MemorySink] = []

    def open_sink(schema: pa.Schema) -> MemorySink:
        sinks[:] = [MemorySink(schema)]
        return sinks[0]

    write(open_sink)
    return sinks[0].table()


def _pour(
    write: Callable[[Callable[[pa.Schema], ParquetSink]], None], file: IO[bytes], *, behind: bool = True
) -> None:
    sinks: list[ParquetSink] = []

    def open_sink(schema: pa.Schema) -> ParquetSink:
        for sink in sinks:  # an earlier attempt at the same table: its bytes are cut off
            sink.close()
        sinks[:] = [ParquetSink(file, schema, behind=behind)]
        return sinks[0]

    write(open_sink)
    sinks[0].close()


def _described(name: str, file: IO[bytes]) -> ResultFile:
    digest, n_bytes = sha256(), 0
    for piece in pieces_of(file):
        digest.update(piece)
        n_bytes += len(piece)
    return ResultFile(name, n_bytes, digest.hexdigest())


def _write_replicates(
    contents: JobContents, open_sink: Callable[[pa.Schema], Any], progress: Callable[[int, int], None] | None
) -> None:
    fields, _ = replicate_fields(contents)
    base = pa.schema(fields, contents.remarks())
    write_view(base, lambda: replicate_groups(contents, progress), open_sink)


def _write_aggregates(contents: JobContents, open_sink: Callable[[pa.Schema], Any]) -> None:
    rows = AggregateRows(contents)
    write_view(pa.schema(rows.fields, contents.remarks(of_rows=False)), rows.groups, open_sink, rows.order)
