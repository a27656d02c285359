"""What a replicate may leave behind in a process, and how the next one does not see it.

Warm isolation puts back the environment variables, the working directory, the umask, the handlers of
SIGINT and SIGTERM, and the standard streams. It does not put back modules, globals or random state: a
model that needs a fresh process says ``isolation = "fork"`` or ``"spawn"``.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the module `signal` would build its enums first
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_INT, _TERM = _signal.SIGINT, _signal.SIGTERM


class ProcessState:
    """The state of this process to go back to. Costs about a microsecond to check."""

    def __init__(self, workdir: str) -> None:
        self._workdir = workdir
        self._environ: Any = os.environ
        self._open_workdir()
        self.adopt()

    def adopt(self) -> None:
        """Take the state as it is now for the one to go back to: an import may have set it up."""
        self._variables: dict[Any, Any] = dict(self._environ._data)
        self._umask = os.umask(0o022)
        os.umask(self._umask)
        self._handlers = (_signal.getsignal(_INT), _signal.getsignal(_TERM))
        self._streams = (sys.stdin, sys.stdout, sys.stderr)

    def _open_workdir(self) -> None:
        self._workdir_fd = os.open(self._workdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def restore(self) -> None:
        """Put everything back."""
        if self._environ._data != self._variables or os.environ is not self._environ:
            self._restore_environ()
        os.fchdir(self._workdir_fd)
        os.umask(self._umask)
        if (
            _signal.getsignal(_INT) is not self._handlers[0]
            or _signal.getsignal(_TERM) is not self._handlers[1]
        ):
            for number, handler in zip((_INT, _TERM), self._handlers):
                if handler is not None:  # None: installed from C; it cannot be put back from here
                    _signal.signal(number, handler)
        sys.stdin, sys.stdout, sys.stderr = self._streams

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
