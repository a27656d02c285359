"""What a replicate may leave behind in a process, and how the next one does not see it.

Warm isolation puts back the environment variables, the working directory, the umask, the handlers of
SIGINT, SIGTERM and SIGALRM, an alarm that is still set, and the standard streams. It does not put back
modules, globals or random state: a model that needs a fresh process says ``isolation = "fork"`` or
``"spawn"``.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the module `signal` would build its enums first
import os
import sys
from io import TextIOWrapper

from modelops_runner import stdio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SIGINT, _SIGTERM, _SIGALRM = _SIGNALS = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGALRM)
# Not looked up for each replicate; and what a model puts in their place is not called.
_getsignal, _alarm = _signal.getsignal, _signal.alarm
_fchdir, _umask, _set_blocking = os.fchdir, os.umask, os.set_blocking


class ProcessState:
    """The state of this process to go back to. Costs a few microseconds to check."""

    def __init__(self, workdir: str, marks: int) -> None:
        self._marks = marks
        self._workdir = workdir
        self._environ: Any = os.environ
        self._open_workdir()
        self.adopt()

    def adopt(self) -> None:
        """Take the state as it is now for the one to go back to: an import may have set it up."""
        self._variables: dict[Any, Any] = dict(self._environ._data)
        self._umask = os.umask(0o022)
        os.umask(self._umask)
        self._handlers = tuple(map(_signal.getsignal, _SIGNALS))
        self._alarm = _signal.getitimer(_signal.ITIMER_REAL)[0] > 0.0  # then it is the bundle's to keep
        self._adopt_streams()

    def _adopt_streams(self) -> None:
        """Take the standard streams as they are now."""
        self._streams = (sys.stdin, sys.stdout, sys.stderr)
        # The others were put there at import: they are the bundle's own.
        self._texts = [(fd, s) for fd, s in enumerate(self._streams) if type(s) is TextIOWrapper]

    def _open_workdir(self) -> None:
        self._workdir_fd = os.open(self._workdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def restore(self) -> None:
        """Put everything back."""
        if self._environ._data != self._variables or os.environ is not self._environ:
            self._restore_environ()
        _fchdir(self._workdir_fd)
        _umask(self._umask)
        if not self._alarm:
            _alarm(0)
        interrupt, terminate, alarm = self._handlers
        if (
            _getsignal(_SIGINT) is not interrupt
            or _getsignal(_SIGTERM) is not terminate
            or _getsignal(_SIGALRM) is not alarm
        ):
            self._restore_handlers()
        sys.stdin, sys.stdout, sys.stderr = self._streams
        _set_blocking(self._marks, True)  # the same file as 1 and 2; asyncio and some programs change it
        try:
            for _, stream in self._texts:
                if stream.closed:
                    break
            else:
                return
        except ValueError:  # detached from its file
            pass
        self.descriptor_was_closed()

    def _restore_handlers(self) -> None:
        for number, handler in zip(_SIGNALS, self._handlers):
            # None: installed from C; it cannot be put back from here
            if _signal.getsignal(number) is not handler is not None:
                _signal.signal(number, handler)

    def descriptor_was_closed(self) -> None:
        """Open what the model closed of 0, 1, 2 and of the streams upon them."""
        stdio.put_back(self._marks)
        streams = list(self._streams)
        for fd, stream in self._texts:
            if not stdio.usable(stream):
                streams[fd] = stdio.new_stream(fd)
        sys.stdin, sys.stdout, sys.stderr = streams
        self._adopt_streams()

    def workdir_was_replaced(self) -> None:
        """Take hold of the working directory anew, after `Workspace.restore` may have made it again."""
        os.close(self._workdir_fd)
        self._open_workdir()

    def _restore_environ(self) -> None:
        os.environ = self._environ  # noqa: B003  the very object, in case the model put another in its place
        wanted = {
            self._environ.decodekey(k): self._environ.decodevalue(v) for k, v in self._variables.items()
        }
        for name in set(self._environ) - set(wanted):
            del self._environ[name]
        for name, value in wanted.items():
            if self._environ.get(name) != value:
                self._environ[name] = value
