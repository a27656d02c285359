"""Where the bytes of outputs go: into the frame while they are few, otherwise once into a file."""

from __future__ import annotations

import os
from binascii import b2a_base64
from errno import EFBIG, EMFILE
from time import time_ns

from modelops_runner import values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# One frame holds the outputs of one replicate; beyond this many bytes all further ones go to files.
INLINE_TOTAL = 4 * 1024 * 1024
# Of one write. For large ones the kernel takes memory in large blocks, which a virtual machine may have given back to
# its host: 50 MB at once took 110 ms, in such pieces 15.
_PIECE_BYTES = 128 * 1024
_LONG_AGO_NS = 10**10  # ten seconds: more than any file system rounds to
_LIMITS = {EFBIG: "ulimit -f", EMFILE: "ulimit -n"}  # of the process: no space that is freed changes them


class SpoolError(Exception):
    """The folder for large outputs cannot be written; not the value's fault."""


class Spool:
    """A folder whose files belong to the parent as soon as it is told their names."""

    def __init__(self, folder: str, inline_limit: int) -> None:
        self.folder, self.inline_limit = folder, inline_limit
        self._names = self._fork = 0
        self._written: list[str] = []

    def begin(self) -> None:
        """Begin with the outputs of another replicate: the parent knows all that was written."""
        self._written.clear()

    def discard(self) -> None:
        """Remove the files of outputs that nobody will be told of, because a later one cannot cross."""
        for path in self._written:
            os.unlink(path)
        self._written.clear()

    def begin_fork(self) -> None:
        """Let the next fork name its files so that they can be told from those of others."""
        self._fork += 1

    def discard_fork(self) -> None:
        """Remove the files of the last fork: it has ended before the parent was told of them."""
        try:
            for name in os.listdir(self.folder):
                if name.endswith(f"-{self._fork}.out"):
                    os.unlink(os.path.join(self.folder, name))
        except FileNotFoundError:  # a model has removed the folder
            pass

    def new_path(self) -> str:
        """Return a name that no other runner of this folder uses."""
        self._names += 1
        # Forks have the same counter, and pids come again.
        return os.path.join(
            self.folder, f"{os.getpid()}-{self._names}-{os.urandom(4).hex()}-{self._fork}.out"
        )

    def output(self, value: object, room: int = INLINE_TOTAL) -> tuple[str, str]:
        """Return the kind of a value and its ``data`` as JSON text, at most ``room`` bytes of it inline."""
        sink = _Sink(self, min(self.inline_limit, room))
        try:
            kind = values.write(value, sink)
            data = sink.finish(kind)
        except BaseException:
            sink.discard()
            raise
        if sink.path:
            self._written.append(sink.path)
        return kind, data


class _Sink:
    """A binary file that begins in memory and moves to the spool when it grows. Hashes what it writes."""

    closed = False  # pyarrow asks

    def __init__(self, spool: Spool, limit: int) -> None:
        self._spool, self._limit = spool, limit
        self._head: list[bytes] = []
        self._n = 0
        self.path = ""
        self._fd = -1
        self._hash: Any = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        n = len(view)
        self._n += n
        if self._fd < 0:
            if self._n <= self._limit:
                self._head.append(bytes(view))
                return n
            self._spill()
        self._append(view)
        return n

    def finish(self, kind: str) -> str:
        """Return the ``data`` field of the output, as JSON text."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            stamp = self._stamp(fd)
            try:
                os.close(fd)  # some file systems tell of a full disk only now
            except OSError as e:
                raise self._failed(e) from e
            path = values.dumps(self.path)
            return f'{{"$file":{path},"bytes":{self._n},"sha256":"{self._hash.hexdigest()}"{stamp}}}'
        data = b"".join(self._head)
        if kind == "json":
            return data.decode("ascii")
        return '"' + b2a_base64(data, newline=False).decode("ascii") + '"'

    def _stamp(self, fd: int) -> str:
        """Set the file's time of modification to one that is over, so that a later write shows; return both its times.

        Empty if that cannot be done, or if somebody else has written to this descriptor: then its bytes must tell.
        """
        try:
            if os.lseek(fd, 0, os.SEEK_CUR) != self._n:
                return ""
            over = time_ns() - _LONG_AGO_NS
            os.utime(fd, ns=(over, over))
            stats = os.fstat(fd)
        except OSError:
            return ""
        return f',"stamp":[{stats.st_mtime_ns},{stats.st_ctime_ns}]'

    def discard(self) -> None:
        """Remove the file of a value that turned out not to cross."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self.path:
            os.unlink(self.path)
            self.path = ""

    def flush(self) -> None:
        """Do nothing: there is no buffer once a file is open."""

    def _spill(self) -> None:
        from hashlib import sha256  # loads OpenSSL

        path = self._spool.new_path()
        try:
            self._fd = self._created(path)
        except OSError as e:
            raise self._failed(e) from e
        self.path, self._hash = path, sha256()
        for part in self._head:
            self._append(memoryview(part))
        self._head.clear()

    def _created(self, path: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:  # a model has removed the folder: to wait would not bring it back
            os.makedirs(self._spool.folder, 0o700, exist_ok=True)
            return os.open(path, flags, 0o600)

    def _append(self, view: memoryview) -> None:
        self._hash.update(view)
        try:
            while len(view):
                view = view[os.write(self._fd, view[:_PIECE_BYTES]) :]
        except OSError as e:
            raise self._failed(e) from e

    def _failed(self, error: OSError) -> Exception:
        limit = _LIMITS.get(error.errno or 0)
        if limit is not None:
            return values.InvalidOutputError(
                f"it could not be written to a file: {error.strerror}; a limit of the process ({limit}), which the "
                "model or whoever started the worker has set, is in the way"
            )
        return SpoolError(f"an output could not be written to {self._spool.folder}: {error.strerror}")


def read_output(kind: str, data: Any) -> Any:
    """Return the value of an output as the parent sends it: inline, or by path."""
    if type(data) is dict and "$file" in data:
        with open(data["$file"], "rb") as file:
            file.seek(data.get("offset", 0))
            content = file.read(data["bytes"])
        if len(content) != data["bytes"]:
            raise OSError(f"{data['$file']} ended after {len(content)} of {data['bytes']} bytes")
        return values.decode(kind, content)
    if kind == "json":
        return values.untagged(data)
    from binascii import a2b_base64

    return values.decode(kind, a2b_base64(data))
