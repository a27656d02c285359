"""The files of a job that may be copied while it runs and after: whole, and named with their digests.

Segments, aggregate segments and result files have a recorded digest. Of packs it is computed here, a bounded time per
call; what is begun is gone on with in the next.
"""

from __future__ import annotations

import contextlib
import threading
import time
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import msgspec

from modelops.errors import NotFoundError
from modelops.states import FINAL_JOB_STATES
from modelops.store.overview import StoredFile, committed_file, committed_files
from modelops.store.segments import job_folder
from modelops.study.ids import JobId

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelops.store import JobRow, Objects, Records

FOLDER: Final = "results"
RESULTS: Final = tuple(f"{FOLDER}/{name}.parquet" for name in ("aggregates", "attempts", "replicates"))
PIECE_BYTES: Final = 4 << 20
BUDGET_S: Final = 5.0
MAX_REMEMBERED: Final = 100_000


class FilePage(msgspec.Struct, frozen=True):
    """Files of a job, by name. ``final``: the job has ended. ``next``: cursor of the next page, null on the last."""

    files: list[StoredFile]
    final: bool
    next: str | None


class JobFiles:
    """The files of the jobs of one store."""

    def __init__(self, records: Records, objects: Objects) -> None:
        self._records, self._objects = records, objects
        self._digests: dict[
            tuple[str, int], str
        ] = {}  # object; version of the job, as results may be replaced
        self._begun: dict[tuple[str, int], tuple[Any, int]] = {}
        self._lock = threading.Lock()

    def page(self, job: str, after: str, limit: int, budget_s: float = BUDGET_S) -> FilePage:
        """Return files whose names follow ``after``.

        Fewer than there are, maybe none, when the time is up before their digests are known. Raises NotFoundError.
        """
        deadline = time.monotonic() + budget_s
        row = self._records.job(JobId(job))
        out: list[StoredFile] = []
        for file in self._all(row):
            if file.name <= after:
                continue
            digest = file.sha256 or self._digest(row, file, deadline)
            if len(out) == limit or digest is None:
                return FilePage(out, row.state in FINAL_JOB_STATES, out[-1].name if out else after)
            out.append(StoredFile(file.name, file.n_bytes, digest))
        return FilePage(out, row.state in FINAL_JOB_STATES, None)

    def one(self, job: str, name: str) -> tuple[str, StoredFile]:
        """Return the object that holds a file, and what is known of it.

        Raises
        ------
        NotFoundError
            There is no such job, or it has no such file; what is stored and not committed is no file of it.
        """
        row = self._records.job(JobId(job))
        file = committed_file(self._records, row.job, name)
        if file is None and name.startswith(f"{FOLDER}/") and row.state in FINAL_JOB_STATES:
            file = next((f for f in self._results(row) if f.name == name), None)
        if file is None:
            raise NotFoundError(f"job {job} has no file {name!r}, or does not have it yet")
        digest = file.sha256 or self._digests.get(self._key(row, name), "")
        return f"{job_folder(row.job)}/{name}", StoredFile(name, file.n_bytes, digest)

    def _all(self, row: JobRow) -> list[StoredFile]:
        files = committed_files(self._records, row.job)
        if row.state in FINAL_JOB_STATES:
            files += self._results(row)
        return sorted(files, key=lambda file: file.name)

    def _results(self, row: JobRow) -> Iterator[StoredFile]:
        """Yield the result files; none if the job failed before it ran."""
        recorded = self._records.result_files(row.job)
        for file in recorded:
            yield StoredFile(f"{FOLDER}/{file.name}", file.n_bytes, file.sha256)
        for name in () if recorded else RESULTS:  # a job of a ModelOps that did not record them
            with contextlib.suppress(NotFoundError):
                yield StoredFile(name, self._objects.size(f"{job_folder(row.job)}/{name}"))

    def _key(self, row: JobRow, name: str) -> tuple[str, int]:
        return f"{row.job}/{name}", row.version if name in RESULTS else 0

    def _digest(self, row: JobRow, file: StoredFile, deadline: float) -> str | None:
        """Return the digest of a file, or None when it is not known by the deadline."""
        key = self._key(row, file.name)
        with self._lock:
            if key in self._digests:
                return self._digests[key]
            digest, at = self._begun.pop(key, None) or (sha256(), 0)
            while at < file.n_bytes:
                if time.monotonic() > deadline:
                    self._begun[key] = digest, at
                    return None
                length = min(PIECE_BYTES, file.n_bytes - at)
                digest.update(self._objects.read(f"{job_folder(row.job)}/{file.name}", at, length))
                at += length
            if len(self._digests) >= MAX_REMEMBERED:
                self._digests.clear()
            return self._digests.setdefault(key, digest.hexdigest())
