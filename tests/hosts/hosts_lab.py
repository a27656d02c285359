"""Hosts on one machine: a network namespace each, with an address of its own, on one bridge. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self
from urllib.parse import urlsplit

import firewall
import psycopg
import psycopg.conninfo
import psycopg.sql
import services

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import modelops as mo

NET = "198.18.{}"  # for tests of networks (RFC 2544): no other network has it
DEADLINE_S = 180.0
HERE = Path(__file__).parent
# The one that tests use elsewhere speaks no TLS.
INSTALLED = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
COMMAND = str(Path(sys.executable).with_name("modelops"))
PARTS = ("scheduler", "server", "worker-a", "worker-b")
HTTP_PORTS = {"scheduler": 8787, "server": 8785, "worker-a": 8787, "worker-b": 8787}


def why_not() -> str:
    """Return why there can be no hosts here; empty: there can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    for program in ("ip", "nft", "setpriv"):
        if shutil.which(program) is None:
            return f"there is no program {program!r}"
    if not INSTALLED:
        return "there is no PostgreSQL that speaks TLS; on Debian: apt-get install postgresql"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun cannot be used"
    try:
        with Lab() as lab:
            hosts = [lab.host(far=far) for far in (False, True)]
            for host in hosts:
                _reach(host)
            peers = [
                firewall.Peer(host.address, of) for host, of in zip(hosts, ("server", "worker"), strict=True)
            ]
            firewall.close(hosts[0], peers[0], peers, database=hosts[1].address)
            firewall.refused(hosts[0])
    except (AssertionError, OSError) as error:
        said, _, _ = str(error).partition("\n")
        return f"two hosts cannot be made, reached, and closed: {said}"
    return ""


LISTENS = """\
import socket
with socket.create_server(("", 4000)) as server:
    print("listens", flush=True)
    server.accept()
"""


def _reach(host: Host) -> None:
    """Connect to a host."""
    command = host.inside(sys.executable, "-c", LISTENS)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as listener:
        try:
            assert listener.stdout is not None
            assert listener.stderr is not None
            assert listener.stdout.readline() == "listens\n", listener.stderr.read().strip()
            socket.create_connection((host.address, 4000), timeout=10).close()
        finally:
            listener.kill()


def wait_for(holds: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {deadline_s:g} s: {what}"
        time.sleep(0.1)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


class Place(Protocol):
    """Where a service runs: a host of the lab, or this machine."""

    @property
    def address(self) -> str: ...

    def inside(self, *command: str) -> list[str]:
        """Return the command that runs another one there."""
        ...


class Host:
    """One host. ``far``: its cable takes its time and loses packets, as `weather` says."""

    def __init__(self, lab: Lab, number: int, *, far: bool) -> None:
        self.namespace = f"mo{os.getpid()}-{number}"
        self.address = f"{lab.net}.{number}"
        self._cable = f"mv{os.getpid() % 100_000}-{number}"
        self._relay: subprocess.Popen[str] | None = None
        self._weather = (0.0, 0.0)
        ip("netns", "add", self.namespace)
        try:
            self._connect(lab, far)
        except BaseException:
            self.close()
            raise

    def _connect(self, lab: Lab, far: bool) -> None:
        ip("-n", self.namespace, "link", "set", "lo", "up")
        if far:
            relay = [sys.executable, str(HERE / "relay.py"), self.namespace, f"{self.address}/24", lab.bridge]
            self._relay = subprocess.Popen(relay, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self._relay.stdout is not None
            assert self._relay.stdout.readline() == "ready\n", "its cable cannot be laid"
        else:
            ip("link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
            ip("link", "set", self._cable, "master", lab.bridge, "up")
            ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
            ip("-n", self.namespace, "link", "set", "eth0", "up")

    def weather(self, delay_s: float, loss: float) -> None:
        """Let every packet to and from it take so long, and such a part of them be lost."""
        self._weather = (delay_s, loss)
        self._say(delay_s, loss)

    def cut(self) -> None:
        """Let nothing come through; nobody is told."""
        if self._relay is None:
            ip("link", "set", self._cable, "down")
        else:
            self._say(0.0, 1.0)

    def mend(self) -> None:
        """Let everything come through as before."""
        if self._relay is None:
            ip("link", "set", self._cable, "up")
        else:
            self._say(*self._weather)

    def _say(self, delay_s: float, loss: float) -> None:
        assert self._relay is not None
        assert self._relay.stdin is not None
        self._relay.stdin.write(f"{delay_s} {loss}\n")
        self._relay.stdin.flush()

    def inside(self, *command: str) -> list[str]:
        """Return the command that runs another one on this host."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def close(self) -> None:
        if self._relay is not None:
            self._relay.terminate()
            self._relay.communicate()
        # It would go with its namespace, but later, and until then its name is taken.
        subprocess.run(["ip", "link", "del", self._cable], capture_output=True, check=False)
        ip("netns", "del", self.namespace)


class Lab:
    """The hosts and their bridge, on which this process has an address as well. Use it in a ``with`` block."""

    def __init__(self) -> None:
        self.net = NET.format(os.getpid() % 250)
        self.bridge = f"mobr{os.getpid() % 100_000}"
        self._stack = contextlib.ExitStack()
        self._n = 0

    def __enter__(self) -> Self:
        ip("link", "add", self.bridge, "type", "bridge")
        self._stack.callback(ip, "link", "del", self.bridge)
        try:
            ip("addr", "add", f"{self.net}.254/24", "dev", self.bridge)
            ip("link", "set", self.bridge, "up")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def host(self, *, far: bool = False) -> Host:
        """Add a host."""
        self._n += 1
        host = Host(self, self._n, far=far)
        self._stack.callback(host.close)
        return host


class Postgres(services.Postgres):
    """A PostgreSQL server on a host, which speaks TLS only; at a free port, or at this one."""

    def __init__(self, host: Place, certificates: Path, port: int | None = None) -> None:
        super().__init__()
        self.port = port or self.port
        self._installed = INSTALLED[-1].parents[1]
        self.host, self._certificates = host, certificates

    def start(self) -> None:
        for name, mode in (("cert.pem", 0o644), ("key.pem", 0o600)):
            copy = self._folder / name
            shutil.copyfile(self._certificates / name, copy)
            copy.chmod(mode)
            if self._user is not None:
                os.chown(copy, self._user.pw_uid, self._user.pw_gid)
        hba = self._folder / "data" / "pg_hba.conf"
        hba.write_text("hostssl all all 0.0.0.0/0 trust\n")
        options = {
            "listen_addresses": self.host.address, "unix_socket_directories": "", "max_connections": "100",
            "ssl": "on", "ssl_cert_file": str(self._folder / "cert.pem"), "ssl_key_file": str(self._folder / "key.pem"),
        }  # fmt: skip
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        command = [str(self._installed / "bin" / "postgres"), "-D", str(self._folder / "data"), *settings]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.host.inside(*self._as_user(), *command, "-p", str(self.port)),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder,
            )  # fmt: skip
        services._wait_for(self._answers, self._process, self._folder / "log")

    def _as_user(self) -> tuple[str, ...]:
        if self._user is None:
            return ()
        return ("setpriv", f"--reuid={self._user.pw_uid}", f"--regid={self._user.pw_gid}", "--clear-groups")

    def url(self, ca: Path) -> str:
        """Return the SQLAlchemy URL of a new database."""
        name, trust = f"lab_{next(self._numbers)}", {"sslmode": "verify-full", "sslrootcert": str(ca)}
        place = psycopg.conninfo.make_conninfo(
            host=self.host.address, port=self.port, user="postgres", dbname="postgres", **trust
        )
        with psycopg.connect(place, autocommit=True) as sql:
            sql.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)))
        asked = "&".join(f"{key}={value}" for key, value in trust.items())
        return f"postgresql+psycopg://postgres@{self.host.address}:{self.port}/{name}?{asked}"

    def _answers(self) -> bool:
        return self._run("pg_isready", "-h", self.host.address, "-p", str(self.port), check=False) == 0


class S3(services.S3):
    """An S3 service on a host, which speaks TLS only; at a free port, or at this one."""

    def __init__(self, host: Place, certificates: Path, port: int | None = None) -> None:
        super().__init__()
        self.port = port or self.port
        self.host, self._certificates = host, certificates

    @property
    def environ(self) -> dict[str, str]:
        found = {**super().environ, "AWS_ENDPOINT_URL": f"https://{self.host.address}:{self.port}"}
        del found["AWS_ALLOW_HTTP"]
        return {**found, "SSL_CERT_FILE": str(self._certificates / "ca.pem")}

    def start(self) -> None:
        ports = {name: services.free_port() for name in ("master", "volume", "filer")}
        command = [
            str(Path(sys.executable).with_name("weed")), "-logtostderr", "server", "-ip=127.0.0.1", "-ip.bind=0.0.0.0",
            f"-dir={self._folder}", "-s3", f"-s3.port={services.free_port()}", f"-s3.port.https={self.port}",
            f"-s3.cert.file={self._certificates / 'cert.pem'}", f"-s3.key.file={self._certificates / 'key.pem'}",
            f"-s3.config={self._folder / 's3.json'}", "-volume.max=20", "-master.volumeSizeLimitMB=64",
            "-s3.port.iceberg=0", "-s3.port.lance=0",
            *(f"-{name}.port={port}" for name, port in ports.items()),
            *(f"-{name}.port.grpc={services.free_port()}" for name in (*ports, "s3")),
        ]  # fmt: skip
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.host.inside(*command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder
            )
        services._wait_for(self._answers, self._process, self._folder / "log")

    def _answers(self) -> bool:
        context = ssl.create_default_context(cafile=str(self._certificates / "ca.pem"))
        return services.is_healthy(f"https://{self.host.address}:{self.port}/healthz", context)

    def _make_bucket(self) -> None:
        code = (
            "import sys, time\nfrom obstore.store import S3Store\n"
            f"store = S3Store({self.BUCKET!r})\nend = time.monotonic() + 60\n"
            "while True:\n    try:\n        store.put('ready', b'')\n        break\n"
            "    except Exception as e:\n        assert time.monotonic() < end, e\n        time.sleep(0.05)\n"
        )  # as its parent class does; in a process of its own, which knows the authority
        subprocess.run([sys.executable, "-c", code], env={**os.environ, **self.environ}, check=True)


class Part:
    """A part of ModelOps on a host: `modelops server`, `scheduler` or `worker`."""

    def __init__(self, host: Host, home: Path, environ: Mapping[str, str], *arguments: str) -> None:
        self.host, self._arguments, self._home = host, arguments, home
        self.log = home / "log"
        home.mkdir(parents=True)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MODELOPS_", "AWS_"))}
        self._environ = {**clean, "MODELOPS_HOME": str(home), **environ}

    def __enter__(self) -> Self:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.host.inside(COMMAND, *self._arguments), env=self._environ, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()


@dataclass
class Pool:
    """All that runs, and where."""

    client: mo.Client
    hosts: dict[str, Host]
    parts: dict[str, Part]

    def n_workers(self) -> int:
        return len(self.workers())

    def workers(self) -> list[tuple[str, int]]:
        """Return address and port of the workers that have slots."""
        answer = self.client.source.http.get("/server").as_type(dict)
        places = [urlsplit(worker["address"]) for worker in answer["workers"] if worker["slots"]]
        return [(str(place.hostname), int(place.port or 0)) for place in places]
