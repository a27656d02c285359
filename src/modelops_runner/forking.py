"""Fork isolation: every replicate in a fresh copy of this warm process. A crash costs that replicate only.

The child speaks to us over a pipe of its own, one message a line, and only whole lines go on to the parent:
a child that dies while it writes cannot break a frame. A fork copies one thread only, so a process in which
others run (or a library that keeps locks) is not safe to fork; `hazard` decides before the first one.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the module `signal` builds its enums first
import os
import select
import sys
from time import perf_counter

from modelops_runner import stdio
from modelops_runner.channel import REFUSED, STORAGE_FAILED, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, NoReturn

    from modelops_runner.channel import Channel

TRIAL_S = 5.0
LOOK_S = 0.5  # how often to ask after a child that says nothing
STALLED_AFTER_S = 5.0  # a child that a signal stopped for this long does not go on
_HARMLESS_THREADS = frozenset({"jemalloc_bg_thd"})  # an allocator's; it has handlers for fork
_FINISHED = b'{"jsonrpc":"2.0","method":"replicate/finished"'
_STOPPED = (
    '{"type":"ProcessExited","message":"signal 9 (Killed): the process was stopped (SIGSTOP) and did not go on",'
    '"traceback":"","file":"","line":0}'
)
_ASKED = b'{"jsonrpc":"2.0","id":'
_FAILED = b"!"  # begins the line of a child that could not hand over its outputs


def hazard() -> str | None:
    """Return why this process must not be forked, None if it may."""
    threads = _other_threads()
    if threads:
        return (
            f"{len(threads)} other threads run after importing the bundle: {', '.join(sorted(set(threads)))}"
        )
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


def _other_threads() -> list[str]:
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


def run_in_child(channel: Channel, work: Callable[[int], str], index: int, timeout_s: float | None) -> str:
    """Run one replicate in a child and pass its messages on; return its status.

    Nothing of the child stays: what it started is killed when it has ended, also what left its session.

    Parameters
    ----------
    work
        Runs the replicate in the child and returns the message that says how it ended.
    timeout_s
        After this long the child and its descendants are killed.
    """
    stdio.flush()
    kept = set(_children(os.getpid()))  # the bundle's own helpers, started when it was imported
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
    child = _Child(pid)
    try:
        end = _forward(channel, ours, child, None if timeout_s is None else before + timeout_s)
    except BaseException:
        _kill(pid)
        child.wait()
        raise
    finally:
        channel.relay = -1
        os.close(ours)
        os.close(relay)
    if end in ("timed_out", "stopped") or channel.ended:
        _kill(pid)
    child.wait()
    _kill_left_behind(kept)
    if end == "finished":
        return "finished"
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

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.exit: int | None = None
        self.cpu_s = 0.0
        self._stopped_at: float | None = None

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

    def wait(self) -> None:
        """Wait for its end."""
        if self.exit is None:
            _, status, usage = os.wait4(self.pid, 0)
            self._ended(status, usage)

    def _ended(self, status: int, usage: Any) -> None:
        self.exit = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        self.cpu_s = usage.ru_utime + usage.ru_stime


def _child(channel: Channel, work: Callable[[int], str], index: int, pipe: int, replies: int) -> NoReturn:
    channel.divert(pipe, replies)
    try:
        channel.send(work(index))
    except RpcError as e:
        channel.send(_FAILED.decode() + ascii(e.message)[1:-1])  # on the pipe, which is the channel's now
    stdio.flush()
    os._exit(0)


def _forward(channel: Channel, pipe: int, child: _Child, deadline: float | None) -> str:
    """Pass whole lines on; return ``finished``, ``timed_out``, ``stopped``, or ``gone`` without an outcome.

    The time while the child waits for an answer of the parent's is not the replicate's.
    """
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    poll.register(channel.requests, select.POLLIN)
    pieces: list[bytes] = []  # of a line whose end has not come yet
    n_asked, waits_since = 0, 0.0
    while True:
        waits = n_asked > channel.n_relayed
        left_s = LOOK_S if deadline is None or waits else min(LOOK_S, deadline - perf_counter())
        if left_s <= 0.0:
            return "timed_out"
        events = poll.poll(left_s * 1_000)
        if not events:
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
