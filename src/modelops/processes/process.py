"""One runner process: start it, shake hands, talk to it under a deadline, kill it, clean up after it.

Rules of the file:

- Nothing is sent before ``initialize`` is answered, and nothing to a process that is known to be dead.
- Whoever kills says why (`Kill`), once; the first reason stands. What the process had sent before it died is
  read to the end, so a replicate that finished in the last moment counts.
- A broken pipe is how a death looks from here; it is reported as that death.
- One thread at a time talks; `wake` and `kill` may be called from any thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import select
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from modelops.errors import (
    OUT_OF_MEMORY,
    HandshakeError,
    ProcessExitedError,
    ProcessTimeoutError,
    ProtocolError,
    RemoteError,
    StorageError,
)
from modelops.processes.compiled import Compiled
from modelops.processes.drain import Drain, RotatingFile
from modelops.processes.environ import runner_environ
from modelops.processes.memory import ProcessMemory
from modelops.processes.process_folder import make_folders, remove_folders
from modelops.processes.sheet import Sheet
from modelops.processes.watch import Watch, Watched
from modelops.rpc import Answer, Asked, Failure, Initialize, Initialized, Message, Peer, Shutdown
from modelops.rpc.messages import PROTOCOL
from modelops_runner.launch import runner_argv

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from modelops.processes.cgroup import CgroupHome
    from modelops.processes.memory import Surroundings
    from modelops.processes.outcome import LogSink, RunnerSpec
    from modelops.processes.reaper import Child, Reaper
    from modelops.rpc.messages import Wire

REFUSED, STORAGE_FAILED = -32003, -32004
INLINE_LIMIT = 65_536
READ_BYTES = 1 << 18
PIPE_BYTES = 1 << 20
_F_SETPIPE_SZ = 1031  # fcntl.F_SETPIPE_SZ, which exists on Linux only
DEATH_S = 30.0  # how long a killed process may take to disappear (it may be in the middle of a large write)
LINGER_S = 1.0  # between the end of its stream, or ``shutdown``, and its end
LONGEST_WAIT_MS = 24 * 3_600_000  # of poll(2), which takes no more milliseconds than an int holds: 24 days


@dataclass(frozen=True, slots=True)
class Kill:
    """Why we killed a process.

    ``kind``: ``timeout``, ``memory``, ``stalled``, ``cancelled``, ``protocol`` or ``closing``. ``index``: the
    replicate that was meant, where one was. ``peak_bytes``: for ``memory``.
    """

    kind: str
    text: str
    index: int | None = None
    peak_bytes: int | None = None


class RunnerProcess:
    """A runner that was started; `start` makes one.

    Parameters
    ----------
    folder
        A folder of this process alone; removed by `close`, but for spooled files that belong to outcomes.
    """

    def __init__(
        self,
        spec: RunnerSpec,
        *,
        reaper: Reaper,
        watch: Watch,
        cgroups: CgroupHome | None,
        surroundings: Surroundings,
        folder: Path,
        log_path: Path,
        sink: LogSink | None = None,
    ) -> None:
        self.spec, self.folder = spec, folder
        self.entries: set[str] = set()  # entry points that are imported there
        self.runs = 0  # requests it has served
        self.idle_since = 0.0
        self.owned: set[str] = set()  # spooled files that outcomes name
        self.info: Initialized | None = None
        self.killed: Kill | None = None
        self._killed_at = 0.0
        self._reaper, self._watch = reaper, watch
        self._lock = threading.Lock()
        self._closed = False
        self._marker = secrets.token_hex(16)
        self._peer = Peer()
        self._outgoing = bytearray()
        self._eof = False
        self.n_received_bytes = 0
        make_folders(folder)
        self._compiled = Compiled(folder / "cache", spec.pycache)
        self._compiled.take()
        self._memory = ProcessMemory(spec.memory_bytes, cgroups)
        self.surroundings = surroundings
        self._watched: Watched | None = None
        self._child = self._spawn(log_path, sink)

    # --- its life ----------------------------------------------------------------------------------

    def _spawn(self, log_path: Path, sink: LogSink | None) -> Child:
        spec = self.spec
        with contextlib.ExitStack() as theirs:
            stdin_r, self._stdin = os.pipe()
            theirs.callback(os.close, stdin_r)
            self._stdout, stdout_w = os.pipe()
            theirs.callback(os.close, stdout_w)
            stderr_r, stderr_w = os.pipe()
            theirs.callback(os.close, stderr_w)
            self._wake_r, self._wake_w = os.pipe()
            for fd in (self._stdin, self._stdout, self._wake_r, self._wake_w):
                os.set_blocking(fd, False)
            for fd in (stdout_w, stderr_w):
                with contextlib.suppress(OSError):  # a wish: the user's pages for pipes may be used up
                    fcntl.fcntl(fd, _F_SETPIPE_SZ, PIPE_BYTES)
            self._poll = select.poll()
            self._poll.register(self._stdout, select.POLLIN)
            self._poll.register(self._wake_r, select.POLLIN)
            self._woken = select.poll()
            self._woken.register(self._wake_r, select.POLLIN)
            self.drain = Drain(stderr_r, self._marker, RotatingFile(log_path))
            self.drain.begin(sink)
            fds = [stdin_r, stdout_w, stderr_w]
            try:
                self.sheet = Sheet.new()
                if self.sheet is not None:
                    theirs.callback(self.sheet.handed_over)
                    fds.append(self.sheet.fd)
                if spec.environment_dir is not None:
                    lock = os.open(Path(spec.environment_dir, ".in-use"), os.O_RDWR | os.O_CREAT, 0o666)
                    theirs.callback(os.close, lock)
                    fcntl.flock(lock, fcntl.LOCK_SH)
                    fds.append(lock)
                return self._reaper.spawn(
                    runner_argv(spec.python),
                    env=runner_environ(
                        os.environ,
                        environment_dir=spec.environment_dir,
                        threads=spec.threads,
                        tmpdir=self.folder / "tmp",
                        cache_dir=self.folder / "cache",
                        pycache=spec.pycache,
                        extra=spec.env,
                    ),
                    cwd=self.folder / "work",
                    fds=fds,
                    on_exit=self.wake,
                    cgroup=self._memory.cgroup,
                )
            except BaseException:
                theirs.close()
                self._dispose()
                raise

    def handshake(self, preload: Sequence[str], *, timeout_s: float) -> None:
        """Initialize the runner, import the entry points in it, and check that it is what was asked for.

        Raises
        ------
        ProcessExitedError
            It died; carries how, and what it wrote.
        RemoteError
            An entry point cannot be imported.
        ProcessTimeoutError
            No answer in time; it has been killed.
        HandshakeError
            It is another Python, another prefix, another bundle or another protocol.
        """
        request_id = self.request(
            Initialize(
                bundle_digest=self.spec.bundle_digest,
                snapshot=self.spec.snapshot,
                workdir=str(self.folder / "work"),
                tmpdir=str(self.folder / "tmp"),
                spool=str(self.folder / "spool"),
                marker=self._marker,
                isolation=self.spec.isolation,
                inline_limit=INLINE_LIMIT,
                sheet=msgspec.UNSET if self.sheet is None else self._child.held[0],
                preload=tuple(preload),
                wire=self.spec.wire,
            )
        )
        result = self.answer(request_id, "initialize", timeout_s=timeout_s).result
        assert isinstance(result, Initialized)
        self.info = result
        self._check(result)
        self.entries.update(preload)

    def _check(self, info: Initialized) -> None:
        spec = self.spec
        if info.protocol != PROTOCOL:
            raise HandshakeError(f"the runner speaks protocol {info.protocol}, this worker {PROTOCOL}")
        if spec.python_version is not None and info.python != spec.python_version:
            raise HandshakeError(
                f"{spec.python} is Python {info.python}, the environment was made for {spec.python_version}"
            )
        if spec.environment_dir is not None and not _same_folder(info.prefix, spec.environment_dir):
            raise HandshakeError(
                f"{spec.python} runs in {info.prefix}, not in the environment {spec.environment_dir}"
            )
        if info.bundle_digest != spec.bundle_digest:
            raise HandshakeError(
                f"the runner holds bundle {info.bundle_digest}, the job needs {spec.bundle_digest}"
            )

    @property
    def fork_refused(self) -> str | None:
        """Why it must not be forked, as it said when it had imported the bundle; None if it may."""
        return self.info.capabilities.fork_refused if self.info is not None else None

    @property
    def takes_tables(self) -> bool:
        """Whether it takes many parameter sets in one piece."""
        return self.info is not None and self.info.capabilities.tables

    @property
    def pid(self) -> int:
        """Its pid."""
        return self._child.pid

    @property
    def dead(self) -> bool:
        """Whether it has ended, or closed its end of the connection."""
        if not (self._eof or self._child.exited.is_set()):
            # A process that died a moment ago is seen here before the reaper tells.
            self._eof = any(
                fd == self._stdout and flags & select.POLLHUP and not flags & select.POLLIN
                for fd, flags in self._poll.poll(0)
            )
        return self._eof or self._child.exited.is_set()

    def kill(self, why: Kill) -> None:
        """Kill it with all its descendants; the first reason stands."""
        with self._lock:
            if self.killed is not None:
                return
            self.killed, self._killed_at = why, time.monotonic()
        self._reaper.kill(self._child)

    def wake(self) -> None:
        """Let `receive` return."""
        with self._lock:
            if not self._closed:
                with contextlib.suppress(BlockingIOError):
                    os.write(self._wake_w, b"!")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Have memory (where no cgroup does it) and stalls watched within this block."""
        watched = Watched(
            self.pid,
            self._memory.to_watch,
            self._too_large,
            lambda: self.kill(Kill("stalled", "the process was stopped (SIGSTOP) and did not go on")),
        )
        self.surroundings.look(time.monotonic())  # so that what was before does not count
        self._watch.add(watched)
        try:
            yield
        finally:
            self._watch.remove(watched)

    def _too_large(self, peak_bytes: int) -> bool:
        """Kill what takes too much memory; return whether that is the whole process, or only a fork of it."""
        if self.spec.isolation == "fork" and self._memory.kill_a_fork(self.pid, peak_bytes):
            return False
        self.kill(Kill("memory", "", peak_bytes=peak_bytes))
        return True

    def new_oom_kills(self) -> bool:
        """Say whether somebody was killed for its memory since this was last asked."""
        return self._memory.new_kills()

    def taken_for_memory(self) -> bool:
        """Say whether it has ended because there was no more memory for all that runs here. Asked once."""
        # Of one whose reaper was killed nothing is known but that it has ended with it.
        return (
            self.killed is None
            and self.exit_peak() is not None
            and self.surroundings.has_killed(self.returncode())
        )

    def memory_message(self) -> str:
        """Return the sentence with limit and peak for a process that took too much."""
        killed = self.killed
        return self._memory.message(killed.peak_bytes if killed and killed.kind == "memory" else None)

    def max_rss_bytes(self, now: float, seconds: float) -> int | None:
        """Return its highest memory so far, read at most ten times a second."""
        return self._memory.peak_bytes(self.pid, now, seconds)

    def returncode(self) -> int:
        """Return how it ended, as ``Popen`` reports it. Kills it if it lingers with its connection closed."""
        if not self._child.exited.wait(LINGER_S):
            self.kill(Kill("protocol", "it closed its connection but went on running"))
            if not self._child.exited.wait(DEATH_S):
                raise ProcessTimeoutError(f"process {self.pid} was killed and does not end")
        exit_ = self._child.exit
        assert exit_ is not None
        return exit_.returncode

    def exit_peak(self) -> int | None:
        """Return the highest resident size over its whole life, once it has ended."""
        return self._child.exit.max_rss_bytes if self._child.exit else None

    def close(self, *, graceful: bool = False) -> None:
        """End it and remove what it leaves: cgroup, folders, files that nobody owns."""
        idle = not self.dead and self.killed is None
        if graceful and not self.dead and self.killed is None:
            self.request(Shutdown())
            self._child.exited.wait(LINGER_S)
        if not self._child.exited.is_set():
            self.kill(Kill("closing", "no longer needed"))
            self._child.exited.wait(DEATH_S)
        if idle and self._child.exited.is_set():
            self._compiled.leave()
        self._dispose()

    def _dispose(self) -> None:
        with self._lock:
            self._closed = True
            for fd in (self._stdin, self._stdout, self._wake_r, self._wake_w):
                os.close(fd)
        self.drain.close()
        self._memory.remove()
        remove_folders(self.folder, self.owned)

    # --- messages ----------------------------------------------------------------------------------

    def request(self, params: Wire) -> int:
        """Send a request and return its id; its answer comes by `receive`."""
        request_id, frame = self._peer.request(params)
        self._send(frame)
        return request_id

    def notify(self, params: Wire) -> None:
        """Send a notification."""
        self._send(self._peer.notify(params))

    def done(self, asked: Asked, why_not: str | None = None) -> None:
        """Answer what the process asked for: it was done, or could not be done."""
        self._send(self._peer.done(asked) if why_not is None else self._peer.not_done(asked, why_not))

    def _send(self, frame: bytes) -> None:
        """Queue a frame and send what the pipe takes; `receive` sends the rest."""
        self._outgoing += frame
        self._flush()

    def shape(self, number: int) -> tuple[str, ...] | None:
        """Return the names that the process has given this number to; None if it has not been read yet."""
        return self._peer.shape(number)

    @property
    def unsent(self) -> int:
        """Bytes that wait for the process to read."""
        return len(self._outgoing)

    def _flush(self) -> None:
        try:
            while self._outgoing:
                n = os.write(self._stdin, memoryview(self._outgoing)[:PIPE_BYTES])
                del self._outgoing[:n]
        except BlockingIOError:
            self._poll.register(self._stdin, select.POLLOUT)
            return
        except BrokenPipeError:
            self._outgoing.clear()  # it is dying; its end will tell how
        with contextlib.suppress(KeyError):
            self._poll.unregister(self._stdin)

    def pause(self, seconds: float) -> None:
        """Let messages gather in the pipe, so that each of them need not wake us; ends when `wake` is called."""
        if not self._outgoing and self.killed is None:
            self._woken.poll(seconds * 1000)

    def receive(self, deadline: float | None) -> list[Message]:
        """Return the messages that arrive next; none when woken, at the deadline, after a day, or when it is dead.

        Parameters
        ----------
        deadline
            On ``time.monotonic``; None: wait for ever. Of no meaning once the process was killed.
        """
        if self._child.exited.is_set() or self._eof:
            return []
        if self.killed is not None:  # nothing to wait for but its end, of which `wake` tells
            deadline = self._killed_at + DEATH_S
            if time.monotonic() >= deadline:
                raise ProcessTimeoutError(f"process {self.pid} was killed and does not end")
        wait_ms = None
        if deadline is not None:
            wait_ms = min(LONGEST_WAIT_MS, max(0, int((deadline - time.monotonic()) * 1000) + 1))
        messages: list[Message] = []
        for fd, _flags in self._poll.poll(wait_ms):
            if fd == self._stdout:
                messages = self._read()
            elif fd == self._wake_r:
                os.read(self._wake_r, 4096)
            else:
                self._flush()
        return messages

    def receive_rest(self) -> list[Message]:
        """Return what a dead process still had sent."""
        messages: list[Message] = []
        while not self._eof:
            more = self._read()
            if not more and not self._more_to_read():
                break
            messages += more
        return messages

    def _more_to_read(self) -> bool:
        return any(fd == self._stdout and flags & select.POLLIN for fd, flags in self._poll.poll(0))

    def _read(self) -> list[Message]:
        try:
            data = os.read(self._stdout, READ_BYTES)
        except BlockingIOError:
            return []
        if not data:
            self._end_of_stream()
            return []
        self.n_received_bytes += len(data)
        try:
            return self._peer.receive(data)
        except ProtocolError as error:
            self._end_of_stream()
            self.kill(Kill("protocol", str(error)))
            return []

    def _end_of_stream(self) -> None:
        self._eof = True
        self._poll.unregister(self._stdout)

    def answer(self, request_id: int, doing: str, *, timeout_s: float | None) -> Answer:
        """Wait for the answer to a request; other messages are passed over.

        Raises
        ------
        ProcessExitedError, ProcessTimeoutError, RemoteError, HandshakeError, ProtocolError
            As in `handshake`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            messages = self.receive(deadline)
            dead = not messages and self.dead
            if dead:
                messages = self.receive_rest()
            for message in messages:
                if isinstance(message, Failure) and message.id == request_id:
                    raise self.failure(message, doing)
                if isinstance(message, Answer) and message.id == request_id:
                    return message
            if dead:
                raise self.death(doing)
            if not messages and deadline is not None and time.monotonic() >= deadline:
                self.kill(Kill("timeout", f"no answer to {doing} within {timeout_s:g} s"))

    def failure(self, failure: Failure, doing: str) -> Exception:
        """Return the exception that says what a refused request says."""
        if failure.raised is not None:
            raised, tail = failure.raised, self.drain.tail(None)
            return RemoteError(
                raised.type,
                raised.message,
                raised.traceback,
                tail,
                raised.missing_module,
                raised.file,
                raised.line,
            )
        if failure.code == REFUSED:
            return HandshakeError(failure.message)
        if failure.code == STORAGE_FAILED:
            return StorageError(
                f"{failure.message}; free space there, or set MODELOPS_HOME to another volume"
            )
        return ProtocolError(f"the runner refused {doing}: {failure.message} ({failure.code})")

    def death(self, doing: str) -> Exception:
        """Return the exception that says how it ended; waits for its end."""
        returncode = self.returncode()
        self.drain.wait_ended(2.0)
        tail = self.drain.tail(None)
        killed = self.killed
        if killed is not None and killed.kind == "timeout":
            return ProcessTimeoutError(f"{killed.text}; the runner was killed\n{tail}".rstrip())
        if killed is not None and killed.kind == "protocol":
            return ProtocolError(
                f"the runner broke the protocol while doing {doing}: {killed.text}\n{tail}".rstrip()
            )
        if (killed is not None and killed.kind == "memory") or self.new_oom_kills():
            tail = f"{OUT_OF_MEMORY}{self.memory_message()}\n{tail}"
        elif self.taken_for_memory():
            tail = f"no more memory: {self.surroundings.message(self.exit_peak())}\n{tail}"
        elif killed is not None and killed.text:
            tail = f"{killed.text}\n{tail}"
        return ProcessExitedError(doing, returncode, tail)


def _same_folder(one: str, other: str) -> bool:
    with contextlib.suppress(OSError):
        return Path(one).samefile(other)
    return False
