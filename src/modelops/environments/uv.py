"""Calls uv and says what its answer means: final, worth a retry, or a matter of this machine's storage."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from modelops.errors import (
    BundleEnvironmentError,
    ClusterError,
    IndexUnreachableError,
    InternalError,
    ResolutionError,
    StorageError,
)

Progress = Callable[[str], None]

# What would make uv look at another project or Python than the one it is told. Everything else of the user's
# environment stays: indexes, credentials, proxies, certificates, cache folder.
_NOT_OURS: Final = frozenset(
    {
        "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME", "UV_PYTHON", "UV_PROJECT",
        "UV_WORKING_DIR",
        "UV_PROJECT_ENVIRONMENT", "UV_SYSTEM_PYTHON", "UV_MANAGED_PYTHON", "UV_NO_MANAGED_PYTHON",
        "UV_FROZEN",
        "UV_LOCKED", "UV_VENV_SEED", "UV_VENV_CLEAR", "UV_VENV_RELOCATABLE", "UV_REQUIRE_HASHES",
        "PYTHONSTARTUP",
    }
)  # fmt: skip
_SETTINGS: Final = "MODELOPS_"
# Settings that decide what a resolution answers, so they are part of a lock's inputs.
DECIDING: Final = (
    "UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_NO_INDEX",
    "UV_INDEX_STRATEGY", "UV_EXCLUDE_NEWER", "UV_RESOLUTION", "UV_PRERELEASE", "UV_CONSTRAINT", "UV_OVERRIDE",
    "UV_CONFIG_FILE", "UV_TORCH_BACKEND", "UV_NO_BINARY", "UV_NO_BUILD",
    "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL",
)  # fmt: skip
_UNREACHABLE: Final = re.compile(
    r"error sending request|Request failed after|dns error|tcp connect error|Connection (?:refused|reset)"
    r"|operation timed out|connection timed out|Network connectivity is disabled|network was disabled"
    r"|HTTP status (?:server error|client error \((?:408|429))|Temporary failure in name resolution"
    r"|error decoding response body|IncompleteMessage|unexpected end of file",
    re.IGNORECASE,
)
_STORAGE: Final = re.compile(
    r"(?:No space left on device|Disk quota exceeded|Read-only file system|Permission denied"
    r"|Input/output error|Too many open files) \(os error \d+\)"
)


def find_uv() -> Path:
    """Return the uv that was installed with ModelOps."""
    from uv import find_uv_bin  # deferred: a warm start needs no uv

    return Path(find_uv_bin())


def uv_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables for uv: the user's, without those that point it elsewhere, and without ours.

    What builds a package gets them as well, and it is chosen by the bundle: it shall not be handed the server's token
    or the password of its database, nor print them into the error that a job then shows.

    pip's index variables are translated where uv's own are not set: uv does not read them.
    """
    # What the machine trusts, uv should trust, behind a company's proxy too; the user's own word goes first.
    kept = {
        "UV_SYSTEM_CERTS": "1",
        **{k: v for k, v in environ.items() if k not in _NOT_OURS and not k.startswith(_SETTINGS)},
    }
    if not kept.keys() & {"UV_DEFAULT_INDEX", "UV_INDEX_URL"} and "PIP_INDEX_URL" in kept:
        kept["UV_DEFAULT_INDEX"] = kept["PIP_INDEX_URL"]
    if not kept.keys() & {"UV_INDEX", "UV_EXTRA_INDEX_URL"} and "PIP_EXTRA_INDEX_URL" in kept:
        kept["UV_INDEX"] = kept["PIP_EXTRA_INDEX_URL"]
    kept |= {"UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1", "NO_COLOR": "1"}
    kept["UV_PREVIEW_FEATURES"] = ",".join(filter(None, [kept.get("UV_PREVIEW_FEATURES"), "pylock"]))
    return kept


def _installed_uv() -> Path:
    try:
        return find_uv()
    except FileNotFoundError as e:
        raise ClusterError(f"uv is missing beside ModelOps: pip install uv ({e})") from e


class Uv:
    """The uv program, started for one command at a time."""

    def __init__(self, path: Path | None = None, environ: Mapping[str, str] | None = None) -> None:
        self._path = path
        self._environ = environ

    def run(
        self,
        arguments: Sequence[str | Path],
        *,
        what: str,
        volume: Path,
        cwd: Path,
        on_progress: Progress | None = None,
        note_pid: Callable[[int], None] | None = None,
    ) -> str:
        """Run one command and return what it wrote to stderr.

        Parameters
        ----------
        what
            What the dependencies belong to, for messages.
        volume
            Where uv writes, named when that fails.
        note_pid
            Told the process id, so that the next builder can stop a uv whose caller was killed.

        Raises
        ------
        ResolutionError, IndexUnreachableError, StorageError
            What uv's output means.
        """
        command = [str(self._path or _installed_uv()), *map(str, arguments)]
        environ = uv_environ(os.environ if self._environ is None else self._environ)
        try:
            process = subprocess.Popen(
                command, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, errors="replace",
            )  # fmt: skip
        except OSError as e:
            raise StorageError(f"uv ({command[0]}) could not be started: {e}") from e
        lines: list[str] = []
        with process:
            try:
                if note_pid is not None:
                    note_pid(process.pid)
                assert process.stderr is not None
                for line in process.stderr:
                    lines.append(line)
                    if on_progress is not None and not line.startswith((" ", "warning:", "error:")):
                        on_progress(line.rstrip())
            except BaseException:
                kill_tree(process.pid)
                raise
        output = "".join(lines)
        if process.returncode != 0:
            raise explain(output, process.returncode, what=what, volume=volume)
        return output


def explain(
    output: str, returncode: int, *, what: str, volume: Path
) -> BundleEnvironmentError | StorageError | InternalError:
    """Say what a failure of uv means. Pure."""
    words = shorten(output) or f"uv ended with code {returncode} and wrote nothing"
    own = re.split(r"^\s*\[std(?:out|err)\]", words, maxsplit=1, flags=re.MULTILINE)[
        0
    ]  # then a build's own words
    if found := _STORAGE.search(own):
        return StorageError(f"{found[0].split(' (')[0]} on {volume} while preparing {what}:\n{words}")
    if _UNREACHABLE.search(own):
        return IndexUnreachableError(what, words)
    if returncode < 0:
        return StorageError(
            f"uv was killed by {signal.Signals(-returncode).name} while preparing {what}\n{words}"
        )
    if "unexpected argument" in own or "invalid value" in own:
        return InternalError(f"uv refused its arguments while preparing {what}:\n{words}")
    return ResolutionError(what, words)


def shorten(output: str) -> str:
    """Return uv's words from its first error on; progress before it explains nothing."""
    match = re.search(r"^(?:error:|thread ')", output, re.MULTILINE)
    return output[match.start() if match else 0 :].strip()


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants: uv and the build backends it started."""
    for child in _descendants(pid):
        _kill(child)
    _kill(pid)


def start_time(pid: int) -> str | None:
    """Return when a process started, in clock ticks, or None when there is none: tells a reused pid apart."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue  # it ended meanwhile
        children.setdefault(parent, []).append(int(entry.parent.name))
    found = list(children.get(pid, ()))
    for child in found:  # grows while it is walked: breadth first
        found.extend(children.get(child, ()))
    return found
