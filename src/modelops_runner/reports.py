"""What models report while they run: the newest goes out, four times a second, however often they report.

A report that comes too soon after another waits; a later one takes its place. A thread sends what waits if
the model then falls silent. It exists only while something waits, so a model that reports now and then never
shares its process with it.
"""

from __future__ import annotations

from _thread import allocate_lock, start_new_thread
from time import monotonic, sleep

from modelops_runner.values import InvalidOutputError, tagged, to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from modelops_runner.channel import Channel

INTERVAL_S = 0.25
BURST_S = 2.0  # who has been silent may send as many as would have fit in this time
MAX_TEXT = 8_192  # characters of the values as JSON
_MAX_PLAIN = 16  # values, and characters of a text, that need no measuring


class Reports:
    """Sends the reports of the replicates of this process.

    Attributes
    ----------
    waits
        Whether a report has not been sent yet.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._newest: tuple[int, float, Any] | None = None
        self._due = 0.0  # when the next one may go out; in the past if some have not been used
        self._last_due = 0.0
        self.forked()

    def forked(self) -> None:
        """Begin anew in a forked child: the thread is not there, and it may have held the lock."""
        self._lock = allocate_lock()
        self._thread = False

    @property
    def waits(self) -> bool:
        """Whether a report has not been sent yet."""
        return self._newest is not None

    def take(self, index: int, fraction: float, values: dict[str, Any]) -> None:
        """Send a report, or keep it until it may be sent.

        Raises
        ------
        TypeError
            A value is none that JSON can hold.
        ValueError
            The values are too long.
        """
        report = index, fraction, values if _plain(values) else encoded(values)
        with self._lock:
            if monotonic() >= self._due:
                self._send(report)
                return
            self._newest = report
            if self._thread:
                return
            self._thread = True
        start_new_thread(self._send_later, ())

    def end(self) -> None:
        """Send what waits, as its replicate has ended. If replicates end quickly, only that of one in a while."""
        with self._lock:
            report, self._newest = self._newest, None
            if report is not None and monotonic() >= self._last_due:
                self._send(report)
                self._last_due = monotonic() + INTERVAL_S

    def _send_later(self) -> None:
        while True:
            sleep(max(0.0, self._due - monotonic()))
            with self._lock:
                if self._newest is None:
                    self._thread = False
                    return
                if monotonic() >= self._due:
                    report, self._newest = self._newest, None
                    self._send(report)

    def _send(self, report: tuple[int, float, Any]) -> None:
        index, fraction, values = report
        text = values if type(values) is str else encoded(values)
        self._newest = None
        self._channel.send(
            f'{{"jsonrpc":"2.0","method":"context/progress","params":{{"index":{index},'
            f'"fraction":{to_json(fraction)},"values":{text}}}}}'
        )
        self._due = max(self._due, monotonic() - BURST_S) + INTERVAL_S


def _plain(values: dict[str, Any]) -> bool:
    """Say whether these cannot change, and are short; the quick way for who reports very often."""
    if len(values) > _MAX_PLAIN:
        return False
    for name, value in values.items():
        kind = type(value)
        if kind is float or kind is bool or value is None:
            pass
        elif kind is int:
            if not -(2**63) <= value < 2**63:
                return False
        elif kind is not str or len(value) > _MAX_PLAIN:
            return False
        if len(name) > _MAX_PLAIN:
            return False
    return True


def encoded(values: dict[str, Any]) -> str:
    """Return values as tagged JSON. Raises as `Reports.take`."""
    try:
        text = to_json(tagged(values))
    except InvalidOutputError as e:
        raise TypeError(f"context.report: {e}") from None
    if len(text) > MAX_TEXT:
        raise ValueError(
            f"context.report: the values are {len(text)} characters as JSON, more than {MAX_TEXT}"
        )
    return text
