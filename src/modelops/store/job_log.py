"""Read what the bundle of a job printed, by replicate."""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import msgspec

from modelops.errors import IntegrityError, NotFoundError
from modelops.store.segments import job_folder
from modelops.study.wording import counted
from modelops.worker.job_log import LogLine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelops.store.contents import JobContents

ATTEMPTS_AT_ONCE: Final = 4  # whose text is held; each has 64 MiB at most


def log_lines(contents: JobContents) -> Iterator[LogLine]:
    """Yield what was printed, attempt by attempt; ``index`` None is the import and what came between replicates."""
    for name in _names(contents):
        yield from _lines_of(contents, name)


def read_log(contents: JobContents, param: int | str | None, replicate: int | None) -> str:
    """Return what `log_texts` yields, in one."""
    return "".join(log_texts(contents, param, replicate))


def log_texts(contents: JobContents, param: int | str | None, replicate: int | None) -> Iterator[str]:
    """Yield the text of one replicate, of one parameter set, or of the whole job, with a heading for each replicate.

    In the order of the replicates; what several attempts have printed is held one or two attempts at a time.

    Raises
    ------
    NotFoundError
        The job has no such parameter set or replicate; at the call.
    """
    line = contents.spec.line
    if param is None:
        return _all_in_order(contents)
    ordinal = _ordinal(contents, param)
    if replicate is not None:
        try:
            wanted_index = line.index(ordinal, replicate)
        except IndexError:
            raise NotFoundError(
                f"job {contents.job} has no replicate {replicate} of parameter set {param}: they are numbered from 0"
            ) from None
        return (x.text for x in log_lines(contents) if x.index == wanted_index)
    wanted = line.of_param(ordinal)
    return (_headed(contents, x) for x in log_lines(contents) if x.index is not None and x.index in wanted)


def _all_in_order(contents: JobContents) -> Iterator[str]:
    names = _names(contents)
    read = lru_cache(maxsize=ATTEMPTS_AT_ONCE)(lambda nth: _lines_of(contents, names[nth]))
    places: list[tuple[int, int, int]] = []
    for nth in range(len(names)):
        places += ((-1 if x.index is None else x.index, nth, row) for row, x in enumerate(read(nth)))
    places.sort()
    for _, nth, row in places:
        yield _headed(contents, read(nth)[row])


def _names(contents: JobContents) -> list[str]:
    return list(contents.objects.list(f"{job_folder(contents.job)}/logs"))


def _lines_of(contents: JobContents, name: str) -> list[LogLine]:
    data = contents.objects.get(name)
    try:
        text = zlib.decompress(data) if name.endswith(".zz") else data
        return [msgspec.json.decode(line, type=LogLine) for line in text.splitlines()]
    except (zlib.error, msgspec.DecodeError) as e:
        raise IntegrityError(f"{name} is damaged: {e}; what was printed by that attempt is lost") from e


def _ordinal(contents: JobContents, param: int | str) -> int:
    n = contents.spec.line.n_params
    try:
        ordinal = contents.parameters.param_of(param) if isinstance(param, str) else param
    except KeyError:
        ordinal = -1
    if not 0 <= ordinal < n:
        raise NotFoundError(
            f"job {contents.job} has no parameter set {param}: it has {counted(n, 'parameter set')}, numbered from 0; "
            "give a number or a param_id"
        )
    return ordinal


def _headed(contents: JobContents, line: LogLine) -> str:
    if line.index is None:
        heading = "import"
    else:
        place = contents.spec.line.locate(line.index)
        heading = f"parameter set {place.param}, replicate {place.replicate}"
    dropped = f", first {line.dropped_bytes:,} bytes dropped" if line.dropped_bytes else ""
    end = "" if line.text.endswith("\n") else "\n"
    return f"--- {heading}{dropped}\n{line.text}{end}"
