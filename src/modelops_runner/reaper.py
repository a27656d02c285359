"""The reaper: one small process per worker that starts runners and lets none outlive the worker.

Rules of the file:

- It is run by path with ``python -I -S -E`` and imports the standard library only (3.9 or later).
- It has one thread, so ``fork`` is safe here, as it is not in a worker full of threads.
- It is a *child subreaper* (Linux), and so is every runner: what a live runner's children leave behind falls
  to that runner, what a dead runner leaves behind falls to the reaper. Hence a direct child of the reaper
  that is no live runner belongs to a dead one, whatever sessions and double forks lie between, and is killed.
  (The parent-death signal alone follows the creating thread and is not inherited.)
- When the socket to the worker closes, or the worker is no longer the parent, everything below is killed,
  again and again until nothing is left. Then it exits.

Messages on the socket are a length (4 bytes, big-endian) and JSON; descriptors travel beside ``spawn``.

- to it: ``{"op": "spawn", "id", "argv", "env", "cwd", "cgroup": folder or null, "oom_score_adj", "n_fds"}``
  with the descriptors for 0, 1, 2 and any number that the runner just holds; ``{"op": "kill", "id"}``
- from it: ``{"event": "ready"}``, ``{"event": "spawned", "id", "pid", "held"}``, where ``held`` are the numbers
  that the descriptors behind the first three have there; ``{"event": "refused", "id", "message"}``,
  ``{"event": "exited", "id", "returncode", "max_rss_bytes", "cpu_seconds"}``
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import resource
import select
import signal
import socket
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

LENGTH = struct.Struct(">I")
PARENT_POLL_S = 0.5  # only for a worker whose end of the socket was inherited by somebody else
SWEEP_S = 0.01
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LINUX = sys.platform.startswith("linux")


class Socket:
    """Whole messages over a stream socket, with the descriptors that came beside them."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""
        self.fds: list[int] = []

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages that are there now; None at the end of the stream."""
        try:
            data, ancillary, _flags, _address = self.sock.recvmsg(65536, socket.CMSG_SPACE(64 * 4))
        except ConnectionError:
            return None
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                for fd in fds:
                    os.set_inheritable(fd, False)
                self.fds.extend(fds)
        if not data:
            return None
        self.buffer += data
        messages = []
        while len(self.buffer) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self.buffer)[0]
            if len(self.buffer) < end:
                break
            messages.append(json.loads(self.buffer[LENGTH.size : end]))
            self.buffer = self.buffer[end:]
        return messages

    def send(self, message: dict[str, object]) -> None:
        """Send one message; a worker that is gone is noticed by the next receive."""
        body = json.dumps(message).encode()
        with contextlib.suppress(OSError):
            self.sock.sendall(LENGTH.pack(len(body)) + body)


def process_table() -> dict[int, int]:
    """Return ``{pid: parent's pid}`` of all processes that can be seen (empty without ``/proc``)."""
    table: dict[int, int] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            try:
                with open("/proc/" + name + "/stat", "rb") as file:
                    stat = file.read()
            except OSError:
                continue  # it ended meanwhile
            # The command name may hold spaces and parentheses; what follows the last one is plain.
            table[int(name)] = int(stat[stat.rindex(b")") + 2 :].split(None, 2)[1])
    return table


def descendants(root: int, table: dict[int, int]) -> list[int]:
    """Return the pids below ``root``, parents before children."""
    children: dict[int, list[int]] = {}
    for pid, parent in table.items():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found.extend(below)
        queue.extend(below)
    return found


def kill(pid: int) -> None:
    """Kill one process, if it is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def kill_group(pid: int) -> None:
    """Kill the process group that a runner leads, if any of it is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def libc_prctl() -> Callable[..., int]:
    """Return ``prctl``, or something that does nothing where there is none."""
    if not LINUX:
        return lambda *_: 0
    import ctypes

    return ctypes.CDLL(None, use_errno=True).prctl


def become(request: dict[str, Any], fds: list[int], prctl: Callable[..., int], reaper_pid: int) -> NoReturn:
    """In the forked child: become the runner. Returns only by raising."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if LINUX:
        prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # for the day on which the reaper itself is killed
        if os.getppid() != reaper_pid:
            os._exit(127)
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(str(request.get("oom_score_adj", 0)))
    if request.get("cgroup"):
        with open(os.path.join(request["cgroup"], "cgroup.procs"), "w") as file:
            file.write("0")
    os.chdir(request["cwd"])
    # Away from 0..2 first, so that no descriptor is overwritten before it was copied.
    import fcntl

    stdio = [fcntl.fcntl(fd, fcntl.F_DUPFD, 3) for fd in fds[:3]]
    for target, fd in enumerate(stdio):
        os.dup2(fd, target)
        os.close(fd)
    for fd in fds[3:]:
        os.set_inheritable(fd, True)
    os.execve(request["argv"][0], request["argv"], request["env"])


class Reaper:
    """Starts runners, reports their ends, and kills what they leave behind."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = Socket(sock)
        self.prctl = libc_prctl()
        self.runners: dict[int, int] = {}  # pid -> id
        self.cgroups: set[str] = set()
        self.pid = os.getpid()

    def handle(self, message: dict[str, Any]) -> None:
        """Do what one message of the worker asks."""
        if message["op"] == "spawn":
            fds, self.socket.fds = self.socket.fds[: message["n_fds"]], self.socket.fds[message["n_fds"] :]
            try:
                pid = self.spawn(message, fds)
            except OSError as error:
                self.socket.send({"event": "refused", "id": message["id"], "message": str(error)})
            else:
                self.socket.send({"event": "spawned", "id": message["id"], "pid": pid, "held": fds[3:]})
            finally:
                for fd in fds:
                    os.close(fd)
        elif message["op"] == "kill":
            for pid, runner_id in self.runners.items():
                if runner_id == message["id"]:
                    self.kill_tree(pid)

    def spawn(self, request: dict[str, Any], fds: list[int]) -> int:
        """Fork and exec a runner; return its pid, or raise what kept it from starting."""
        failure_read, failure_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                become(request, fds, self.prctl, self.pid)
            except BaseException as error:  # noqa: BLE001 - the parent must learn of it, whatever it is
                os.write(failure_write, f"{request['argv'][0]}: {error}".encode("utf-8", "replace")[:4000])
            finally:
                os._exit(127)
        os.close(failure_write)
        with open(failure_read, "rb") as file:
            failure = file.read()  # empty once exec has closed the other end
        if failure:
            os.waitpid(pid, 0)
            raise OSError(failure.decode())
        self.runners[pid] = request["id"]
        self.cgroups = {cgroup for cgroup in self.cgroups if os.path.isdir(cgroup)}
        if request.get("cgroup"):
            self.cgroups.add(request["cgroup"])
        return pid

    def kill_tree(self, pid: int) -> None:
        """Kill a runner, its process group, and all that is below it."""
        below = descendants(pid, process_table())
        kill_group(pid)
        for child in below:
            kill(child)

    def reap(self) -> None:
        """Collect what has ended, kill what is left of its group and below it, and tell the worker."""
        for pid, status, usage in self.collect():
            if pid not in self.runners:
                continue
            runner_id = self.runners.pop(pid)
            self.sweep()
            self.socket.send(
                {
                    "event": "exited",
                    "id": runner_id,
                    "returncode": os.waitstatus_to_exitcode(status),
                    "max_rss_bytes": usage.ru_maxrss * (1024 if LINUX else 1),
                    "cpu_seconds": usage.ru_utime + usage.ru_stime,
                }
            )

    def collect(self) -> Iterator[tuple[int, int, Any]]:
        """Yield what ``wait4`` says of every child that has ended."""
        if LINUX:
            while True:
                try:
                    ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                except ChildProcessError:
                    return
                if not ended:
                    return
                if ended.si_pid in self.runners:
                    kill_group(ended.si_pid)  # while its pid still cannot be given to anybody else
                yield os.wait4(ended.si_pid, 0)
        for pid in list(self.runners):  # no look without collecting, but no orphans either
            found, status, usage = os.wait4(pid, os.WNOHANG)
            if found:
                kill_group(pid)
                yield found, status, usage

    def sweep(self) -> bool:
        """Kill what dead runners left behind; return whether anything was there."""
        if not LINUX:
            return False
        table = process_table()
        orphans = [pid for pid, parent in table.items() if parent == self.pid and pid not in self.runners]
        for orphan in orphans:
            kill(orphan)
            for child in descendants(orphan, table):
                kill(child)
        return bool(orphans)

    def serve(self) -> None:
        """Work until the worker is gone, then leave nothing behind."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        ending: list[bool] = []
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: ending.append(True))
        parent = os.getppid()
        orphans = False
        while not ending and os.getppid() == parent:
            timeout = SWEEP_S if orphans else PARENT_POLL_S
            readable, _, _ = select.select([self.socket.sock.fileno(), wake_read], [], [], timeout)
            if wake_read in readable:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake_read, 4096)
            if self.socket.sock.fileno() in readable:
                messages = self.socket.receive()
                if messages is None:
                    break
                for message in messages:
                    self.handle(message)
            if wake_read in readable or orphans:
                self.reap()
                orphans = self.sweep()
        self.end_all()

    def end_all(self) -> None:
        """Kill every descendant until none is left, then remove their cgroups."""
        for pid in list(self.runners):
            self.kill_tree(pid)
        while True:
            self.reap()
            left = self.sweep() or bool(self.runners)
            if not left:
                break
            select.select([], [], [], SWEEP_S)
        for cgroup in self.cgroups:
            try:
                os.rmdir(cgroup)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EBUSY):
                    raise


def main() -> None:
    """Serve the worker at the other end of the socket.

    Arguments: the socket's descriptor, then those that the reaper shall hold as long as it lives.
    """
    for number in map(int, sys.argv[1:]):
        os.set_inheritable(number, False)  # a runner must hold neither the socket nor the worker's locks
    reaper = Reaper(socket.socket(fileno=int(sys.argv[1])))
    if LINUX:
        reaper.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    reaper.socket.send({"event": "ready"})
    reaper.serve()


if __name__ == "__main__":
    main()
