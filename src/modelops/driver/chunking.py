"""How large the next chunk is: from small to 2.5 seconds of measured work, and small again at the end.

Towards the end a chunk is at most remaining / slots: guided self-scheduling (Polychronopoulos & Kuck 1987,
doi:10.1109/TC.1987.5009495); of a chunk that takes too long the rest is taken back. What would take less time than
handing it over is never cut smaller, however many slots there are. How long that takes is measured: workers far away
are given more at a time, and the next chunk before they are done.
"""

from __future__ import annotations

from collections import deque
from typing import Final

TARGET_S: Final = 2.5  # of work in a chunk, which costs 45 ms of the cores beside it
# What one driver and its store shall have to take in. More slots get longer chunks, but not so long that outcomes are
# seen late.
CHUNKS_PER_S: Final = 1_000
LONGEST_TARGET_S: Final = 4.0
# While fewer than SURE_AFTER replicates have been measured; what each slot has done so far, if that is more.
TARGET_WHILE_UNSURE_S: Final = 0.1
SURE_AFTER: Final = 32
WORTH_SHARING_S: Final = 0.05  # shorter chunks than this are cut only so that every slot has one
LARGE_BYTES: Final = 32 << 20  # of large outputs in a chunk; one that is alone is stored without a copy
SEGMENT_BYTES: Final = 6 << 20  # of small outputs, compressed; who reads them holds several times as much
MUCH_TO_STORE_BYTES: Final = 8 << 20  # by one replicate
WORTH_STORING_BESIDE_S: Final = 0.5  # what runs for longer is not waited for by a disk
WORTH_SENDING_S: Final = 0.02  # about what handing over a chunk, storing and committing it costs
WORTH_WAITING_S: Final = (
    5.0  # a chunk that takes longer need not wait where it runs: the gap before it is nothing
)
RECENT_HANDOVERS: Final = 8
BRIDGE: Final = 1.5  # as some take longer than the shortest
OVERHEAD_S: Final = 20e-6  # per item, storing included, when nothing else is known
MEMORY: Final = 0.7  # weight of what was known before, at each new measurement


class Meter:
    """Measures the seconds per item, as a ratio of decaying sums.

    A ratio of sums estimates the mean even when durations differ by a factor of 100 (a mean of ratios would
    weigh small chunks as much as large ones). Decay forgets a slow first call: imports, compilation.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._items = 0.0
        self._bytes = self._small_bytes = 0.0
        self.n_measured = 0
        self.seconds_per_item: float | None = None  # expected, never 0; None before the first measurement
        self.longest_s: float | None = None  # of those that were measured together, likewise
        self.handover_s = 0.0  # what a chunk costs beside its work; see `handed_over`
        self._handovers: deque[float] = deque(maxlen=RECENT_HANDOVERS)

    def record(self, n: int, seconds: float, n_bytes: int = 0, small_bytes: int = 0) -> None:
        """Note that ``n`` items took ``seconds``, and how many bytes their large and their small outputs have."""
        if n > 0:
            self._bytes = MEMORY * self._bytes + n_bytes
            self._small_bytes = MEMORY * self._small_bytes + small_bytes
            self._seconds = MEMORY * self._seconds + max(0.0, seconds)
            self._items = MEMORY * self._items + n
            self.n_measured += n
            self.longest_s = max(self.longest_s or 0.0, seconds)
            self.seconds_per_item = self._seconds / self._items + OVERHEAD_S

    def handed_over(self, seconds: float) -> None:
        """Note how long a chunk was on its way, there and back, and stored; of the last ones the shortest counts.

        Some take longer for reasons that are gone the next time: a job that was loaded, a packet that was lost.
        """
        self._handovers.append(min(max(0.0, seconds), TARGET_S))
        self.handover_s = min(self._handovers)

    @property
    def bytes_per_item(self) -> float:
        """How many bytes of large outputs an item is expected to have."""
        return self._bytes / self._items if self._items else 0.0

    def fit(self, size: int) -> int:
        """Return how many of ``size`` items one segment should hold, at least 1: by the bytes of their outputs."""
        for n_bytes, room in ((self._bytes, LARGE_BYTES), (self._small_bytes, SEGMENT_BYTES)):
            if n_bytes:
                size = min(size, int(room * self._items / n_bytes))
        return max(1, size)


def chunk_size(meter: Meter, remaining: int, slots: int) -> int:
    """Return how many of ``remaining`` items (1 or more) go into the next chunk; at least 1."""
    cost = meter.seconds_per_item
    if cost is None or remaining <= 1:
        return 1
    far_s = meter.handover_s
    if meter.n_measured >= SURE_AFTER:
        target_s = max(TARGET_S, min(LONGEST_TARGET_S, slots / CHUNKS_PER_S))
    else:
        done_s = meter.n_measured * cost / max(1, slots)  # by each slot
        target_s = max(TARGET_WHILE_UNSURE_S, far_s, min(TARGET_S, done_s))
    if cost >= target_s:
        return 1
    slots = max(1, slots)
    share = max(remaining / slots, min(WORTH_SHARING_S / cost, -(-remaining // slots)))
    worth = max(int(WORTH_SENDING_S / cost), min(int(far_s / cost), -(-remaining // slots)))
    return meter.fit(max(worth, int(min(target_s / cost, share))))


def queue_depth(meter: Meter) -> int:
    """Return how many chunks may wait for each slot.

    One, as a rule. Two of those that are short and whose outputs are large: such a chunk is stored for about as long as
    it runs, beside the next one, and only when it is stored another takes its place.
    """
    cost, n_bytes = meter.seconds_per_item, meter.bytes_per_item
    if cost is None or n_bytes < MUCH_TO_STORE_BYTES:
        return 1
    n_items = max(1, int(LARGE_BYTES / n_bytes))
    return 2 if cost * n_items <= WORTH_STORING_BESIDE_S else 1


def queue_size(meter: Meter, remaining: int, slots: int) -> int:
    """Return how many of ``remaining`` items may wait behind a running chunk; 0: none.

    None when others could soon be idle beside it, and none when it takes long, as other jobs want the worker as well.
    But where handing over takes long, always as much as is done until the next chunk has arrived, and of much that
    remains half of what would run: what waits is taken back if another is idle.
    """
    cost = meter.seconds_per_item
    if cost is None or cost > WORTH_WAITING_S:
        return 0
    size = min(remaining, chunk_size(meter, remaining, slots))
    chunk_s = cost * size
    if chunk_s <= WORTH_WAITING_S and (chunk_s <= WORTH_SHARING_S or remaining * cost >= 2 * chunk_s * slots):
        return size
    if meter.handover_s <= WORTH_SHARING_S:
        return 0
    bridge = int(BRIDGE * meter.handover_s / cost)
    if chunk_s <= WORTH_WAITING_S:
        bridge = max(bridge, int(remaining / (2 * slots)))
    return min(size, bridge)
