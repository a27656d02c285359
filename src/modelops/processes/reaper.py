"""The worker's end of the reaper: ask it to start and kill runners, hear from it how they ended."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import modelops_runner
from modelops.errors import ProcessError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_LENGTH = struct.Struct(">I")
_PROGRAM = Path(modelops_runner.__file__).with_name("reaper.py")
OOM_SCORE_ADJ = 900  # the kernel takes a runner before it takes the worker


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended: ``returncode`` as ``Popen`` reports it, what it used over its whole life."""

    returncode: int
    max_rss_bytes: int | None
    cpu_seconds: float


@dataclass(eq=False)
class Child:
    """A process that the reaper started. ``exit`` is set, then ``exited``, then ``on_exit`` is called.

    ``held``: the numbers there of the descriptors that it was given to hold.
    """

    id: int
    pid: int
    on_exit: Callable[[], None]
    held: tuple[int, ...] = ()
    exited: threading.Event = field(default_factory=threading.Event)
    exit: Exit | None = None

    def end(self, how: Exit) -> None:
        """Record the end; called once, by the thread that listens to the reaper."""
        self.exit = how
        self.exited.set()
        self.on_exit()


class Reaper:
    """One reaper process and the thread that listens to it. Thread-safe.

    When the reaper itself dies (somebody killed it), its runners die with it and are reported as killed;
    `alive` is False from then on.
    """

    def __init__(self, hold: Sequence[int] = ()) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._children: dict[int, Child] = {}
        self._waiting: dict[int, _Starting] = {}
        self.alive = True
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-E", "-B", str(_PROGRAM), *map(str, (theirs.fileno(), *hold))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *hold),
                start_new_session=True,
                cwd="/",
                env={"LC_ALL": "C.UTF-8"},
            )
        self._thread = threading.Thread(target=self._listen, name="modelops-reaper", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Pid of the reaper process."""
        return self._process.pid

    def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        fds: Sequence[int],
        on_exit: Callable[[], None] = lambda: None,
        cgroup: Path | None = None,
        timeout_s: float = 60.0,
    ) -> Child:
        """Start a process in a session of its own.

        Parameters
        ----------
        fds
            The descriptors that become 0, 1 and 2 there, and others that it shall just hold (`Child.held` tells
            their numbers). The caller keeps and closes its own copies.
        on_exit
            Called by the listening thread once the process has ended and what it left behind is killed.

        Raises
        ------
        ProcessError
            It could not be started; says why.
        """
        request = {
            "op": "spawn",
            "id": next(self._ids),
            "argv": list(argv),
            "env": dict(env),
            "cwd": str(cwd),
            "cgroup": str(cgroup) if cgroup else None,
            "oom_score_adj": OOM_SCORE_ADJ,
            "n_fds": len(fds),
        }
        starting = _Starting(on_exit)
        with self._lock:
            if not self.alive:
                raise ProcessError("the reaper process is gone; no runner can be started by it")
            self._waiting[request["id"]] = starting  # type: ignore[index]  # a dict of mixed values
        self._send(request, fds)
        if not starting.done.wait(timeout_s):
            raise ProcessError(f"the reaper did not start {argv[0]} within {timeout_s:g} s")
        if starting.child is None:
            raise ProcessError(f"could not start the runner: {starting.refusal}{_advice(starting.refusal)}")
        return starting.child

    def kill(self, child: Child) -> None:
        """Kill the process, its group and all its descendants; `Child.exited` tells when it is done."""
        if not child.exited.is_set():
            self._send({"op": "kill", "id": child.id})

    def close(self) -> None:
        """End the reaper, and with it everything it ever started."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._process.wait()
        self._thread.join()
        self._socket.close()

    def _send(self, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
        body = json.dumps(message).encode()
        with self._lock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            # Its end is told by the listener to everybody who waits, so here it is no news.
            if fds:
                socket.send_fds(self._socket, [_LENGTH.pack(len(body))], list(fds))
                self._socket.sendall(body)
            else:
                self._socket.sendall(_LENGTH.pack(len(body)) + body)

    def _listen(self) -> None:
        with self._socket.makefile("rb") as stream:
            while len(head := _read(stream, _LENGTH.size)) == _LENGTH.size:
                body = _read(stream, _LENGTH.unpack(head)[0])
                self._hear(json.loads(body))
        with self._lock:
            self.alive = False
            waiting, self._waiting = self._waiting, {}
            children, self._children = self._children, {}
        for starting in waiting.values():
            starting.refusal = "the reaper process is gone"
            starting.done.set()
        for child in children.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.end(Exit(-signal.SIGKILL, None, 0.0))

    def _hear(self, message: dict[str, object]) -> None:
        runner_id = int(str(message.get("id", 0)))
        event = message["event"]
        if event == "spawned":
            starting = self._waiting.pop(runner_id)
            held = message["held"]
            assert isinstance(held, list)
            child = Child(runner_id, int(str(message["pid"])), starting.on_exit, tuple(held))
            self._children[runner_id] = child
            starting.child = child
            starting.done.set()
        elif event == "refused":
            starting = self._waiting.pop(runner_id)
            starting.refusal = str(message["message"])
            starting.done.set()
        elif event == "exited":
            rss, cpu = message["max_rss_bytes"], message["cpu_seconds"]
            how = Exit(int(str(message["returncode"])), int(str(rss)), float(str(cpu)))
            self._children.pop(runner_id).end(how)


@dataclass(eq=False)
class _Starting:
    """A spawn that was asked for and not answered yet."""

    on_exit: Callable[[], None]
    done: threading.Event = field(default_factory=threading.Event)
    child: Child | None = None
    refusal: str = ""


def _read(stream: object, size: int) -> bytes:
    try:
        return stream.read(size)  # type: ignore[attr-defined,no-any-return]  # BufferedReader of makefile
    except ConnectionResetError:
        return b""


def _advice(refusal: str) -> str:
    """Return what to do where the message of the system does not say it."""
    if os.strerror(errno.EMFILE) not in refusal:
        return ""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"; a process may have {soft:,} files open here, and more are needed: 'ulimit -n 1024', then start again"
