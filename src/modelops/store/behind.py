"""One thing after another in a second thread, while the first goes on: bytes are compressed there outside of Python."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future


class Behind:
    """Does one thing at a time. What goes wrong there is raised by the call after it.

    Close it in any case: until then its thread waits for more. There is none before there is something to do.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: ThreadPoolExecutor | None = None
        self._doing: Future[Any] | None = None

    def do(self, act: Callable[..., object], *args: Any) -> None:
        """Begin with this once what was asked for before is done."""
        self.settle()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix=self._name)
        self._doing = self._thread.submit(act, *args)

    def settle(self) -> None:
        """Wait until all that was asked for is done."""
        doing, self._doing = self._doing, None
        if doing is not None:
            doing.result()

    def close(self) -> None:
        """Wait likewise, and end."""
        try:
            self.settle()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
