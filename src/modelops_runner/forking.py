"""Fork isolation: every replicate in a fresh copy of this warm process. A crash costs that replicate only.

The child speaks to us over a pipe of its own, one message a line, and only whole lines go on to the parent:
a child that dies while it writes cannot break a frame.

A fork copies one thread only. Where others run it may wait for ever for what they would have done. `hazard` says
before the first fork what is certain: Python's own threads, which the bundle started for a purpose, and pools that
are known to hang. Of the threads of C libraries some do harm and some do not, so there each fork is a trial: one
that does nothing for `TRIAL_S` is ended, and the bundle is not forked any more (`HungForkError`).
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the module `signal` builds its enums first
import os
import re
import select
import sys
from time import perf_counter

from modelops_runner import inherited, stdio
from modelops_runner.channel import REFUSED, STORAGE_FAILED, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Callable, NoReturn

    from modelops_runner.channel import Channel

TRIAL_S = 5.0
LOOK_S = 0.5  # how often to ask after a child that says nothing
STALLED_AFTER_S = 5.0  # a child that was stopped, or has finished and stays, for so long does not go on
_HARMLESS_THREADS = frozenset({"jemalloc_bg_thd"})  # an allocator's; it has handlers for fork
_HANGING_POOLS = re.compile(r"polars-\d+")  # started when polars is used; importing it starts others
_FINISHED = b'{"jsonrpc":"2.0","method":"replicate/finished"'
_STOPPED = (
    '{"type":"ProcessExited","message":"signal 9 (Killed): the process was stopped (SIGSTOP) and did not go on",'
    '"traceback":"","file":"","line":0}'
)
_ASKED = b'{"jsonrpc":"2.0","id":'
_FAILED = b"!"  # begins the line of a child that could not hand over its outputs


class HungForkError(Exception):
    """A fork waits for threads that it does not have; the text says how that was seen."""


def hazard() -> str | None:
    """Return why this process must not be forked, None if it may."""
    threads = other_threads()
    if len(sys._current_frames()) > 1 or any(map(_HANGING_POOLS.fullmatch, threads)):
        others = "1 other thread runs" if len(threads) == 1 else f"{len(threads)} other threads run"
        return f"{others} after importing the bundle: {', '.join(sorted(set(threads)))}"
    pid = _fork()
    if pid == 0:
        os._exit(0)
    deadline = perf_counter() + TRIAL_S
    while perf_counter() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return None
        select.select((), (), (), 0.001)
    os.kill(pid, _signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"a trial fork did not end within {TRIAL_S:g} s"


def _fork() -> int:
    if _signal.getsignal(_signal.SIGCHLD) is _signal.SIG_IGN:  # the kernel would not tell how the child ends
        _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    return os.fork()


def other_threads() -> list[str]:
    """Return the names of the threads that a fork of this process would miss."""
    own = str(os.getpid())
    if not os.path.isdir("/proc/self/task"):
        threading = sys.modules.get("threading")
        return ["Python thread"] * (threading.active_count() - 1) if threading else []
    names = []
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm") as file:
                name = file.read().strip()
        except FileNotFoundError:  # it ended meanwhile
            continue
        if task != own and name not in _HARMLESS_THREADS:
            names.append(name)
    return names


def run_in_child(
    channel: Channel,
    work: Callable[[int], str],
    index: int,
    timeout_s: float | None,
    missing: Sequence[str] = (),
) -> str:
    """Run one replicate in a child and pass its messages on; return its status.

    Nothing of the child stays: what it started is killed when it has ended, also what left its session.

    Parameters
    ----------
    work
        Runs the replicate in the child and returns the message that says how it ended.
    timeout_s
        After this long the child and its descendants are killed.
    missing
        Threads that the child will not have.

    Raises
    ------
    HungForkError
        It seems to wait for them. It was killed, and nothing is said of the replicate.
    """
    stdio.flush()
    kept = set(_children(os.getpid()))  # the bundle's own helpers, started when it was imported
    files = inherited.positions()
    ours, theirs = os.pipe()
    replies, relay = os.pipe()
    channel.reserve_ids()
    before = perf_counter()
    pid = _fork()
    if pid == 0:
        os.close(ours)
        os.close(relay)
        _child(channel, work, index, theirs, replies)
    os.close(theirs)
    os.close(replies)
    channel.relay, channel.n_relayed = relay, 0
    child = _Child(pid, before)
    trial_s = None if not missing else TRIAL_S if timeout_s is None else min(TRIAL_S, timeout_s / 2)
    try:
        end = _forward(channel, ours, child, None if timeout_s is None else before + timeout_s, trial_s)
        stays = end == "finished" and not child.leaves(ours)
    except BaseException:
        _kill(pid)
        child.wait()
        raise
    finally:
        channel.relay = -1
        os.close(ours)
        os.close(relay)
    if stays or end in ("timed_out", "stopped", "hung") or channel.ended:
        _kill(pid)
    child.wait()
    _kill_left_behind(kept)
    inherited.restore(files)
    if end == "finished":
        return "finished"
    if end == "hung":
        names = ", ".join(sorted(set(missing)))
        raise HungForkError(f"a fork did nothing for {trial_s:g} s; it lacks the threads {names}")
    how = "timed_out" if end == "timed_out" else "crashed"
    error = _STOPPED if end == "stopped" else "null"
    channel.send(
        f'{{"jsonrpc":"2.0","method":"replicate/finished","params":{{"index":{index},"status":"{how}",'
        f'"returned":"value","outputs":[],"error":{error},"exit":{child.exit},'
        f'"seconds":{perf_counter() - before:.9f},"cpu":{child.cpu_s:.6f}}}}}'
    )
    return how


class _Child:
    """A child of ours, and what the kernel has told of it: ``exit`` as `Popen` has it, and its CPU time."""

    def __init__(self, pid: int, started: float) -> None:
        self.pid = pid
        self.exit: int | None = None
        self.cpu_s = 0.0
        self._stopped_at: float | None = None
        self._active_at, self._ran = started, ""

    def look(self) -> str:
        """Return ``ended``, ``stopped`` (by a signal, and for longer than a moment) or ``running``."""
        while self.exit is None:
            found, status, usage = os.wait4(self.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if not found:
                break
            if os.WIFSTOPPED(status):
                self._stopped_at = perf_counter()
            elif os.WIFCONTINUED(status):
                self._stopped_at = None
            else:
                self._ended(status, usage)
        if self.exit is not None:
            return "ended"
        stopped = self._stopped_at is not None and perf_counter() - self._stopped_at >= STALLED_AFTER_S
        return "stopped" if stopped else "running"

    def leaves(self, pipe: int) -> bool:
        """Wait for the end of a child that has told its outcome on this pipe; False: it does not come.

        What the model has left may keep it, as a thread that reads a file of C's, which cannot be flushed then.
        """
        deadline = perf_counter() + STALLED_AFTER_S
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while self.look() == "running" and perf_counter() < deadline:
            # It is closed with the child; but a process that the model started may hold it open.
            if poll.poll(50) and not os.read(pipe, 1 << 16):
                self.wait()
        return self.exit is not None

    def idle_s(self) -> float:
        """Return for how long it has neither used the CPU nor had children that might."""
        ran = _time_on_cpu(self.pid)
        if ran != self._ran or _children(self.pid):
            self._active_at, self._ran = perf_counter(), ran
        return perf_counter() - self._active_at

    def wait(self) -> None:
        """Wait for its end."""
        if self.exit is None:
            _, status, usage = os.wait4(self.pid, 0)
            self._ended(status, usage)

    def _ended(self, status: int, usage: Any) -> None:
        self.exit = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        self.cpu_s = usage.ru_utime + usage.ru_stime


def _child(channel: Channel, work: Callable[[int], str], index: int, pipe: int, replies: int) -> NoReturn:
    os.setpgid(
        0, 0
    )  # a model may signal its group, to end its helpers: that is not the parent's, nor its siblings'
    channel.divert(pipe, replies)
    _offer_to_the_kernel()
    try:
        channel.send(work(index))
    except RpcError as e:
        channel.send(_FAILED.decode() + ascii(e.message)[1:-1])  # on the pipe, which is the channel's now
    stdio.flush()
    os._exit(0)


def _offer_to_the_kernel() -> None:
    """When memory runs out on the machine, let it take this child and not the process that it was forked from."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:  # no Linux
        pass


def _forward(
    channel: Channel, pipe: int, child: _Child, deadline: float | None, trial_s: float | None
) -> str:
    """Pass whole lines on; return how it ended.

    ``finished``, ``timed_out``, ``stopped``, ``gone`` without an outcome, or ``hung``: it was idle for ``trial_s``.
    The time while the child waits for an answer of the parent's is not the replicate's.
    """
    look_s = LOOK_S if trial_s is None else min(LOOK_S, trial_s / 2)
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    poll.register(channel.requests, select.POLLIN)
    pieces: list[bytes] = []  # of a line whose end has not come yet
    n_asked, waits_since = 0, 0.0
    while True:
        waits = n_asked > channel.n_relayed
        left_s = look_s if deadline is None or waits else min(look_s, deadline - perf_counter())
        hung = trial_s is not None and not waits and child.idle_s() >= trial_s
        if left_s <= 0.0:
            return "hung" if hung else "timed_out"
        events = poll.poll(left_s * 1_000)
        if not events:
            if hung:
                return "hung"
            state = child.look()
            if state == "stopped":
                return state
            if state == "running" or poll.poll(0):
                continue
            return "gone"  # somebody else holds its end of the pipe open
        if any(fd == channel.requests for fd, _ in events):
            channel.pump()
            if deadline is not None and waits and n_asked <= channel.n_relayed:
                deadline += perf_counter() - waits_since
            if channel.ended:
                return "gone"
        if all(fd != pipe for fd, _ in events):
            continue
        data = os.read(pipe, 1 << 16)
        if not data:
            return "gone"
        *lines, rest = data.split(b"\n")
        for line in lines:
            whole = b"".join([*pieces, line])
            pieces.clear()
            if whole.startswith(_FAILED):
                raise RpcError(STORAGE_FAILED, whole[1:].decode("ascii"))
            channel.send(whole.decode("ascii"))
            if whole.startswith(_ASKED):
                waits_since = waits_since if n_asked > channel.n_relayed else perf_counter()
                n_asked += 1
            if whole.startswith(_FINISHED):
                return "finished"
        pieces.append(rest)


def _kill(pid: int) -> None:
    """Kill a child and all that it started."""
    for process in [pid, *_descendants(pid)]:
        try:
            os.kill(process, _signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # gone, or another user's: not ours to end
            pass


def _kill_left_behind(kept: set[int]) -> None:
    """Kill what a child that has ended leaves us: we are a subreaper, so whatever lost its parent is ours."""
    while True:
        left = set(_children(os.getpid())) - kept
        if not left:
            return
        for pid in left:
            _kill(pid)
            kept.add(pid)
            _collect(pid)


def _collect(pid: int) -> None:
    """Wait until a process that was killed is gone; one that could not be killed is left alone."""
    deadline = perf_counter() + TRIAL_S
    while perf_counter() < deadline:
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
        except ChildProcessError:  # the bundle has SIGCHLD ignored, or collects children itself
            return
        select.select((), (), (), 0.001)


def _children(pid: int) -> list[int]:
    """Return the children of a process; none where the system does not tell."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found += map(int, file.read().split())
    except OSError:  # it ended meanwhile, or this is no Linux
        pass
    return found


def _time_on_cpu(pid: int) -> str:
    """Return a text that changes whenever a thread of a process has run, for however short."""
    ran = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/schedstat") as file:
                ran.append(file.read().split()[0])
    except (OSError, IndexError):  # it ended meanwhile, or this is no Linux
        pass
    return " ".join(ran)


def _descendants(pid: int) -> list[int]:
    try:
        os.kill(pid, _signal.SIGSTOP)  # so that it starts no more while we look
    except OSError:  # it is gone
        return []
    children = _children(pid)
    return children + [grandchild for child in children for grandchild in _descendants(child)]


def refuse(reason: str) -> RpcError:
    """Return the answer to a request that would need a fork."""
    return RpcError(REFUSED, f"fork isolation is not safe in this bundle: {reason}; use 'spawn'")
