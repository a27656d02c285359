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
    from typing import Callable, NoReturn

    from modelops_runner.channel import Channel

TRIAL_S = 5.0
_HARMLESS_THREADS = frozenset({"jemalloc_bg_thd"})  # an allocator's; it has handlers for fork
_FINISHED = b'{"jsonrpc":"2.0","method":"replicate/finished"'
_ASKED = b'{"jsonrpc":"2.0","id":'
_FAILED = b"!"  # begins the line of a child that could not hand over its outputs


def hazard() -> str | None:
    """Return why this process must not be forked, None if it may."""
    threads = _other_threads()
    if threads:
        return (
            f"{len(threads)} other threads run after importing the bundle: {', '.join(sorted(set(threads)))}"
        )
    pid = os.fork()
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

    Parameters
    ----------
    work
        Runs the replicate in the child and returns the message that says how it ended.
    timeout_s
        After this long the child and its descendants are killed.
    """
    stdio.flush()
    ours, theirs = os.pipe()
    replies, relay = os.pipe()
    channel.reserve_ids()
    before = perf_counter()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        os.close(relay)
        _child(channel, work, index, theirs, replies)
    os.close(theirs)
    os.close(replies)
    channel.relay, channel.n_relayed = relay, 0
    try:
        finished, timed_out = _forward(channel, ours, None if timeout_s is None else before + timeout_s)
    except BaseException:
        _kill(pid)
        os.waitpid(pid, 0)
        raise
    finally:
        channel.relay = -1
        os.close(ours)
        os.close(relay)
    if timed_out or channel.ended:
        _kill(pid)
    _, status, usage = os.wait4(pid, 0)
    if finished:
        return "finished"
    how = "timed_out" if timed_out else "crashed"
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    channel.send(
        f'{{"jsonrpc":"2.0","method":"replicate/finished","params":{{"index":{index},"status":"{how}",'
        f'"returned":"value","outputs":[],"error":null,"exit":{code},'
        f'"seconds":{perf_counter() - before:.9f},"cpu":{usage.ru_utime + usage.ru_stime:.6f}}}}}'
    )
    return how


def _child(channel: Channel, work: Callable[[int], str], index: int, pipe: int, replies: int) -> NoReturn:
    channel.divert(pipe, replies)
    try:
        channel.send(work(index))
    except RpcError as e:
        channel.send(_FAILED.decode() + ascii(e.message)[1:-1])  # on the pipe, which is the channel's now
    stdio.flush()
    os._exit(0)


def _forward(channel: Channel, pipe: int, deadline: float | None) -> tuple[bool, bool]:
    """Pass whole lines on; return whether the replicate has finished, and whether time ran out.

    The time while the child waits for an answer of the parent's is not the replicate's.
    """
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    poll.register(channel.requests, select.POLLIN)
    rest, n_asked, waits_since = b"", 0, 0.0
    while True:
        waits = n_asked > channel.n_relayed
        left_ms = None if deadline is None or waits else max(0.0, (deadline - perf_counter()) * 1_000)
        events = poll.poll(left_ms)
        if not events:
            return False, True
        if any(fd == channel.requests for fd, _ in events):
            channel.pump()
            if deadline is not None and waits and n_asked <= channel.n_relayed:
                deadline += perf_counter() - waits_since
            if channel.ended:
                return False, False
        if all(fd != pipe for fd, _ in events):
            continue
        data = os.read(pipe, 1 << 16)
        if not data:
            return False, False
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(_FAILED):
                raise RpcError(STORAGE_FAILED, line[1:].decode("ascii"))
            channel.send(line.decode("ascii"))
            if line.startswith(_ASKED):
                waits_since = waits_since if n_asked > channel.n_relayed else perf_counter()
                n_asked += 1
            if line.startswith(_FINISHED):
                return True, False


def _kill(pid: int) -> None:
    """Kill a child and all that it started."""
    for process in [pid, *_descendants(pid)]:
        try:
            os.kill(process, _signal.SIGKILL)
        except ProcessLookupError:
            pass


def _descendants(pid: int) -> list[int]:
    try:
        os.kill(pid, _signal.SIGSTOP)  # so that it starts no more while we look
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            children = [int(child) for child in file.read().split()]
    except OSError:  # it is gone, or this system does not tell
        return []
    return children + [grandchild for child in children for grandchild in _descendants(child)]


def refuse(reason: str) -> RpcError:
    """Return the answer to a request that would need a fork."""
    return RpcError(REFUSED, f"fork isolation is not safe in this bundle: {reason}; use 'spawn'")
