"""Look at this machine before anything runs on it: one `Check` after another, each with how to mend it."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from modelops.bundles.check import shown_bytes
from modelops.checks import Check, failed, ok, warning
from modelops.errors import ModelOpsError
from modelops.home import make_private

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from modelops.home import Home

MIN_FREE_BYTES = 1 << 30
MIN_USABLE_BYTES = 50 << 20  # numpy alone takes this much
MIN_TMP_BYTES = 100 << 20
MIN_OPEN_FILES = 1024
MIN_PROCESSES = 256
INDEX_TIMEOUT_S = 5.0
MAX_CLOCK_SKEW_S = 120.0
EARLIEST = 1_767_225_600  # 2026-01-01: before this version was written
# File systems on which locks or a write-ahead log of SQLite cannot be relied on between hosts.
NETWORK_KINDS = frozenset(
    {
        "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "fuse.sshfs",
        "fuse.glusterfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.blobfuse", "fuse.blobfuse2", "fuse.rclone",
        "pvfs2",
    }
)  # fmt: skip

_MORE_ROOM = "free some space (modelops env gc --max-age 30d), or set MODELOPS_HOME to a larger volume"


def check_machine(
    home: Home, *, environ: Mapping[str, str] = os.environ, on_progress: Callable[[str], None] | None = None
) -> Iterator[Check]:
    """Check what ModelOps needs of a machine, each in well under ten seconds."""
    say = on_progress or (lambda _text: None)
    looks: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("Python", lambda: [python(), packages(), uv(), interpreters(home)]),
        ("folders", lambda: [*folders(home), file_system(home), database(home), temporary_folder()]),
        ("package index", lambda: [index(environ)]),
        ("limits", lambda: [*limits(), memory_limits()]),
        ("processes", lambda: [runner(home), clock(home)]),
        ("pool", lambda: [pool(home)]),
    ]
    for what, look in looks:
        say(f"looking at: {what}")
        yield from look()


def python() -> Check:
    """Check the interpreter that ModelOps itself runs in."""
    found = f"{sys.version.split()[0]} ({sys.executable}) on {sys.platform}"
    return ok("Python", found, version=sys.version.split()[0], executable=sys.executable)


def packages() -> Check:
    """Check the packages that ModelOps stands on."""
    found: dict[str, str] = {}
    for name in ("modelops", "dask", "distributed", "pyarrow", "numpy", "msgspec", "SQLAlchemy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            return failed(
                "packages", f"{name} is not installed", "install ModelOps again: pip install modelops"
            )
    listed = ", ".join(f"{name} {v}" for name, v in found.items())
    if found["dask"] != found["distributed"]:
        return failed(
            "packages", f"{listed}: dask and distributed differ",
            f"pip install distributed=={found['dask']}", versions=found,
        )  # fmt: skip
    return ok("packages", listed, versions=found)


def uv() -> Check:
    """Check that uv is there and answers."""
    from modelops.environments.uv import find_uv

    advice = "install it again: pip install uv"
    try:
        path = find_uv()
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as e:
        return failed("uv", f"it cannot be run: {e}", advice)
    return ok("uv", f"{said.strip()} ({path})", version=said.split()[1], path=str(path))


def interpreters(home: Home) -> Check:
    """List the Pythons that bundles can use."""
    from modelops.environments import Interpreters

    found = Interpreters(home.cache / "interpreters.json").all()
    if not found:
        return failed(
            "interpreters", "no Python was found for bundles",
            "install one, or name it in MODELOPS_PYTHONS=/path/to/python3.12",
        )  # fmt: skip
    return ok("interpreters", ", ".join(map(str, found)), interpreters=[str(i) for i in found])


def folders(home: Home) -> Iterator[Check]:
    """Check that the folders can be written and have room."""
    for name, folder in dict.fromkeys([("data", home.data), ("cache", home.cache), ("state", home.state)]):
        yield folder_check(f"{name} folder", folder)


def folder_check(name: str, folder: Path) -> Check:
    """Write, link and remove a file below a folder, and look at the space of its volume."""
    advice = "set MODELOPS_HOME to a folder that you can write to"
    try:
        make_private(folder)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as trial:
            (Path(trial) / "file").write_bytes(b"x")
            (Path(trial) / "link").symlink_to("file")
            program = Path(trial) / "program"
            program.write_text("#!/bin/sh\n")
            program.chmod(0o755)
            try:
                subprocess.run([program], check=True, timeout=20)
            except PermissionError:
                return failed(
                    name, f"{folder}: programs there cannot be run (mounted noexec)",
                    "set MODELOPS_HOME to a folder on a volume that is not mounted noexec",
                )  # fmt: skip
    except OSError as e:
        advice = _MORE_ROOM if e.errno in (errno.ENOSPC, errno.EDQUOT) else advice
        return failed(name, f"{folder} cannot be written: {e.strerror}", advice)
    free = shutil.disk_usage(folder).free
    where = f"{folder} on {mount_of(folder)[0]}"
    details = {"path": str(folder), "volume": mount_of(folder)[0], "free_bytes": free}
    if free < MIN_USABLE_BYTES:
        message = (
            f"{where}: only {shown_bytes(free)} are free, too little for an environment or a job's results"
        )
        return failed(name, message, _MORE_ROOM, **details)
    if free < MIN_FREE_BYTES:
        return warning(name, f"{where}: only {shown_bytes(free)} are free", _MORE_ROOM, **details)
    return ok(name, f"{where}, {shown_bytes(free)} free", **details)


def file_system(home: Home) -> Check:
    """Check that the database lies on a file system that keeps its promises."""
    mount, kind = mount_of(home.data)
    if kind in NETWORK_KINDS:
        return failed(
            "file system", f"the database would lie on {mount}, a network file system ({kind}), where locks "
            "and write-ahead logs are not safe", "set MODELOPS_HOME to a folder on a local disk",
            mount=mount, kind=kind,
        )  # fmt: skip
    return ok(
        "file system",
        f"the database lies on {mount} ({kind or 'unknown kind'}), a local one",
        mount=mount,
        kind=kind,
    )


def database(home: Home) -> Check:
    """Check that the database answers, and that this version may use it."""
    from modelops.store.database import Database
    from modelops.store.schema import HEAD

    try:
        revision = Database.revision_at(home.database_url)
    except ModelOpsError as error:
        what, _, advice = str(error).partition("; ")
        return failed("database", what, advice)
    if revision is None:
        return ok("database", "none yet: the first command that needs one makes it", revision=None)
    if revision != HEAD:
        said = f"of an older ModelOps (revision {revision}): the next command that needs it brings it up to {HEAD}"
        return ok("database", said, revision=revision)
    return ok("database", f"it answers, revision {revision}", revision=revision)


def mount_of(path: Path, mounts: str | None = None) -> tuple[str, str]:
    """Return the mount point below which a path lies, and the kind of its file system ("" if unknown).

    Parameters
    ----------
    mounts
        Text of ``/proc/self/mounts``; by default it is read.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text()
        except OSError:
            return "/", ""
    real = str(path.resolve())
    best = ("/", "")
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        below = real == point or real.startswith(point.rstrip("/") + "/")
        if below and len(point) >= len(best[0]):  # the last one mounted at a point is the one that is seen
            best = (point, fields[2])
    return best


def temporary_folder() -> Check:
    """Check the folder for temporary files."""
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as e:
        return failed("temporary folder", str(e), "set TMPDIR to a folder that you can write to")
    free = shutil.disk_usage(folder).free
    if free < MIN_TMP_BYTES:
        return warning(
            "temporary folder",
            f"{folder}: only {shown_bytes(free)} are free",
            "free some space, or set TMPDIR",
        )
    return ok("temporary folder", f"{folder}, {shown_bytes(free)} free", path=str(folder), free_bytes=free)


def index(environ: Mapping[str, str]) -> Check:
    """Ask the package index for anything at all, within a few seconds."""
    import urllib.error
    import urllib.request

    names = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
    url = next((environ[name] for name in names if environ.get(name)), None)
    if url is None:
        return _default_index(environ)
    url = url.partition("=")[2] if "=" in url.partition("://")[0] else url  # uv takes NAME=URL too
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        return ok(
            "package index",
            f"{parts._replace(netloc=parts.hostname or '').geturl()}, no server",
            reachable=None,
        )
    host = parts.hostname or url
    began = time.monotonic()
    request = urllib.request.Request(f"{url.rstrip('/')}/pip/", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=INDEX_TIMEOUT_S):
            pass
    except urllib.error.HTTPError:
        pass  # it answered, which is what was asked
    except (OSError, ValueError) as e:
        return warning(
            "package index", f"{host} did not answer within {INDEX_TIMEOUT_S:g} s: {e}",
            "environments that are built already work; for new ones check network and proxy, or name another "
            "index in UV_DEFAULT_INDEX", reachable=False,
        )  # fmt: skip
    seconds = time.monotonic() - began
    return ok("package index", f"{host} answers in {seconds:.2f} s", reachable=True, seconds=seconds)


def _default_index(environ: Mapping[str, str]) -> Check:
    """Have uv look up one package: it knows which index is the default one here, and how to get there."""
    from modelops.environments.uv import find_uv, uv_environ

    command = [str(find_uv()), "pip", "compile", "--quiet", "--no-deps", "--refresh-package", "pip", "-"]
    began = time.monotonic()
    try:
        asked = subprocess.run(
            [*command, "--python", sys.executable],
            input="pip",
            env=uv_environ(environ),
            capture_output=True,
            text=True,
            timeout=INDEX_TIMEOUT_S,
            check=False,
        )
        problem = asked.stderr.strip() if asked.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"no answer within {INDEX_TIMEOUT_S:g} s"
    if problem:
        return warning(
            "package index",
            f"the default index did not answer: {problem}",
            "environments that are built already work; for new ones check network and proxy, or name another "
            "index in UV_DEFAULT_INDEX",
            reachable=False,
        )
    seconds = time.monotonic() - began
    return ok(
        "package index", f"the default index answers in {seconds:.2f} s", reachable=True, seconds=seconds
    )


def limits() -> Iterator[Check]:
    """Check how many files and processes this user may have."""
    for name, which, least, setting in (
        ("open files", resource.RLIMIT_NOFILE, MIN_OPEN_FILES, "ulimit -n"),
        ("user processes", resource.RLIMIT_NPROC, MIN_PROCESSES, "ulimit -u"),
    ):
        soft, hard = resource.getrlimit(which)
        shown = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}"
        if soft != resource.RLIM_INFINITY and soft < least:
            can = hard == resource.RLIM_INFINITY or hard >= least
            advice = f"{setting} {least}" if can else f"have the administrator raise it: {setting} {least}"
            yield warning(name, f"only {shown} are allowed", advice, limit=soft)
        else:
            yield ok(name, f"{shown} allowed", limit=None if soft == resource.RLIM_INFINITY else soft)


def memory_limits() -> Check:
    """Say how memory limits of replicates will be kept."""
    from modelops.processes.cgroup import find_home

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = find_home()
    if found is None:
        message = "no memory cgroup can be made; resident sizes are watched instead, a moment late"
        return ok("memory limits", f"{message}; {shown_bytes(total)} in all", cgroup=None, total_bytes=total)
    return ok(
        "memory limits",
        f"kept by the kernel (cgroup v{found.version}, {found.path}); {shown_bytes(total)} in all",
        cgroup=found.version, total_bytes=total,
    )  # fmt: skip


def runner(home: Home) -> Check:
    """Start a real runner under a real reaper, call a function in it, and stop both."""
    from modelops.processes import ProcessPool, RunnerSpec

    began = time.monotonic()
    try:
        make_private(home.state)
        with contextlib.ExitStack() as stack:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="doctor-", dir=home.state)))
            snapshot = root / "bundle"
            snapshot.mkdir()
            pool = stack.enter_context(contextlib.closing(ProcessPool(root / "pool", slots=1)))
            spec = RunnerSpec(
                python=sys.executable, environment_key="doctor", environment_dir=None, bundle_digest="0" * 64,
                snapshot=str(snapshot), isolation="warm", memory_bytes=None, replicate_timeout_s=30.0,
            )  # fmt: skip
            pid = pool.call(spec, "os:getpid", [])
            pids = pool.pids()
    except (ModelOpsError, OSError) as e:
        return failed(
            "processes", f"a runner process could not be started: {e}",
            "look at the limits above, and whether security software stops programs below the state folder",
        )  # fmt: skip
    left = [p for p in {pid, *pids} if Path(f"/proc/{p}").exists()]
    if left:
        return failed(
            "processes", f"runner process {left[0]} did not end when it was told to", f"kill -9 {left[0]}"
        )
    seconds = time.monotonic() - began
    return ok("processes", f"a runner started, answered and ended in {seconds:.2f} s", seconds=seconds)


def clock(home: Home, *, now: float | None = None) -> Check:
    """Check the clock against this program's age and against the volume that files are written to."""
    now = time.time() if now is None else now
    if now < EARLIEST:
        said = time.strftime("%Y-%m-%d", time.gmtime(now))
        return failed(
            "clock", f"it says {said}, which cannot be", "set the clock; TLS certificates fail otherwise"
        )
    try:
        with tempfile.TemporaryFile(dir=home.state) as file:
            file.write(b"x")
            file.flush()
            skew = os.fstat(file.fileno()).st_mtime - time.time()
    except OSError:
        skew = 0.0  # that the folder cannot be written is said above
    if abs(skew) > MAX_CLOCK_SKEW_S:
        return warning(
            "clock", f"files below {home.state} get times that are {skew:+.0f} s off",
            "set the clocks of this machine and of its file server by NTP", skew_seconds=skew,
        )  # fmt: skip
    return ok("clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)), skew_seconds=skew)


def pool(home: Home) -> Check:
    """Look at the server, scheduler and workers of this home, if they run."""
    from modelops.cluster.status import pool_status

    try:
        found = pool_status(home)
    except ModelOpsError as error:
        return failed("pool", str(error))
    if not found.running:
        return ok("pool", "no server runs; the first command that needs one starts it", running=False)
    failing = [role for role in found.roles if role.state == "failing"]
    if failing:
        names = ", ".join(role.role for role in failing)
        message = f"{names} dies as soon as it is started, again and again ({failing[0].last_end})"
        return failed("pool", message, f"see {failing[0].log}", running=True)
    if not found.answers:
        return warning(
            "pool",
            f"the server does not answer at {found.url or 'its port'}",
            "wait a moment, it may be starting; then see modelops status, and its log",
            running=True,
        )
    n = sum(role.role.startswith("worker") and role.state == "running" for role in found.roles)
    return ok(
        "pool", f"the server answers at {found.url}; {n} workers run", running=True, url=found.url, workers=n
    )
