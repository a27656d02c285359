"""What a bundle printed, kept by replicate: ``logs/<attempt>.jsonl.zz`` of the job, written once per attempt."""

from __future__ import annotations

import contextlib
import logging
import threading
import zlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Self

import msgspec

from modelops.errors import StorageError
from modelops.store.objects import AlreadyExistsError
from modelops.store.segments import job_folder

if TYPE_CHECKING:
    from collections.abc import Iterable

    from modelops.store import Objects
    from modelops.study.ids import AttemptId, JobId

log = logging.getLogger(__name__)
MAX_BYTES_PER_ATTEMPT = 64 * 1024 * 1024
KEPT_TAIL_BYTES = 16 * 1024  # of a replicate whose text had to make room


class LogLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The text of one replicate (``index``), or of the import and of what came between (``index`` None).

    ``dropped_bytes``: how much of its beginning was not kept.
    """

    index: int | None
    text: str
    dropped_bytes: int = 0


class JobLog:
    """Collect text in bounded memory; store it when the attempt ends. Nothing is stored if nothing was printed."""

    def __init__(self, objects: Objects, job: JobId, attempt: AttemptId) -> None:
        self._objects, self._job = objects, job
        self._name = f"{job_folder(job)}/logs/{attempt}.jsonl.zz"
        self._text: OrderedDict[int | None, bytearray] = OrderedDict()
        self._dropped: dict[int | None, int] = {}
        self._n_bytes = 0
        self._is_stored = False
        self._lock = threading.Lock()

    def split(self, attempt: AttemptId, indices: Iterable[int]) -> JobLog:
        """Return a log under the name of another attempt; the text of these replicates moves there."""
        other = JobLog(self._objects, self._job, attempt)
        with self._lock:
            for index in indices:
                text = self._text.pop(index, None)
                if text is not None:
                    other._text[index] = text
                    self._n_bytes -= len(text)
                    if index in self._dropped:
                        other._dropped[index] = self._dropped.pop(index)
        return other

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.store()
            return
        try:
            self.store()
        except StorageError as lost:  # the error that is on its way says more
            log.warning("%s", lost)

    def store(self) -> None:
        """Store what was printed, once; may be called again after it failed."""
        if self._text and not self._is_stored:
            with contextlib.suppress(AlreadyExistsError):  # the name is this attempt's: the answer was lost
                self._objects.put_new(self._name, zlib.compress(b"".join(self._lines()), 1))
            self._is_stored = True

    def write(self, index: int | None, data: bytes) -> None:
        """Add what replicate ``index`` wrote. Who prints most without end has been cut short before."""
        with self._lock:
            self._text.setdefault(index, bytearray()).extend(data)
            self._n_bytes += len(data)
            while self._n_bytes > MAX_BYTES_PER_ATTEMPT and self._shorten():
                pass

    def _shorten(self) -> bool:
        """Keep only the tail of the oldest text that is longer than a tail; False if there is none."""
        for index, text in self._text.items():
            excess = len(text) - KEPT_TAIL_BYTES
            if excess > 0:
                del text[:excess]
                self._dropped[index] = self._dropped.get(index, 0) + excess
                self._n_bytes -= excess
                return True
        return False

    def _lines(self) -> list[bytes]:
        order = sorted(self._text, key=lambda i: -1 if i is None else i)
        return [
            msgspec.json.encode(
                LogLine(
                    index=i,
                    text=self._text[i].decode(errors="replace"),
                    dropped_bytes=self._dropped.get(i, 0),
                )
            )
            + b"\n"
            for i in order
        ]
