"""What ``modelops bundle check`` runs in a bundle's environment. Standard library only, Python 3.9 and later.

The runner loads this file by its path (`call_of`), so nothing is installed or copied for it. It uses the
runner's own modules to find the entry points, exactly as a job does.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import sys
import tempfile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_NAMES = 20


def import_all(entries: list[list[str]], wire: bool, root: str) -> list[dict[str, Any]]:
    """Import entry points, ``[kind, entry]`` each; return an error object, or an empty dict, for each."""
    from modelops_runner import aggregates, calls, entrypoints
    from modelops_runner.failures import error_object

    found: list[dict[str, Any]] = []
    for kind, entry in entries:
        try:
            if kind == "model":
                calls.model(entry, wire=wire, root=root)
                if wire and ":" in entry:
                    entrypoints.resolve(entry)
            elif kind == "target":
                aggregates.find(entry, wire=True)
            else:
                entrypoints.resolve(entry)
        except BaseException as e:  # noqa: BLE001  the bundle's code
            found.append(error_object(e, (root, os.getcwd())))  # noqa: PTH109  as the runner does
        else:
            found.append({})
    return found


def observe(entry: str, wire: bool, root: str, params: dict[str, Any], seed: int) -> dict[str, Any]:
    """Run one replicate in a process that has run none, and tell what it left behind."""
    from modelops_runner import calls

    seen: dict[str, Any] = {}
    environ, folders = dict(os.environ), (os.getcwd(), os.environ["TMPDIR"])  # noqa: PTH109
    files = [_files(folder) for folder in folders]
    with _StdoutMeter() as meter:
        at_start = _random_state()
        model, takes_context = calls.model(entry, wire=wire, root=root)
        seen["stdout_import_bytes"] = meter.count()
        if "numpy" in sys.modules:
            import numpy.random  # noqa: F401  numpy itself imports it only when it is first used
        imported = _random_state()
        seen["random_at_import"] = _changed(at_start, imported)
        args = (params, seed, *([_context(seed)] if takes_context else []))
        model(*args)
        seen["stdout_bytes"] = meter.count() - seen["stdout_import_bytes"]
        seen["stdout_text"] = meter.head()
        after = _random_state()
        changed = _changed(imported, after)
        if "numpy.random" in after and "numpy.random" not in imported:
            # It came with the first replicate, so only a second one, with another seed, tells.
            model(params, seed + 1, *args[2:])
            changed = sorted({*changed, *_changed(after, _random_state())})
    seen["random_state"] = changed
    seen["cwd_changed"] = os.getcwd() != folders[0]  # noqa: PTH109
    seen["environ"] = sorted(k for k in {*environ, *os.environ} if environ.get(k) != os.environ.get(k))[
        :MAX_NAMES
    ]
    for name, folder, before in zip(("workdir_files", "tmpdir_files"), folders, files):  # noqa: B905  Python 3.9
        now = _files(folder)
        touched = sorted(p for p in {*now, *before} if now.get(p) != before.get(p))
        seen[name], seen["n_" + name] = touched[:MAX_NAMES], len(touched)
    seen["peak_bytes"] = _peak_bytes()
    return seen


class _StdoutMeter:
    """Points descriptor 1 at a file without a name, so that prints of Python, C and children all count."""

    def __enter__(self) -> _StdoutMeter:
        self._file = tempfile.TemporaryFile()
        _flush()
        self._real = os.dup(1)
        os.dup2(self._file.fileno(), 1)
        return self

    def __exit__(self, *_: object) -> None:
        _flush()
        os.dup2(self._real, 1)
        os.close(self._real)
        self._file.close()

    def count(self) -> int:
        """Return how many bytes were written so far."""
        _flush()
        return os.fstat(self._file.fileno()).st_size

    def head(self) -> str:
        """Return the beginning of what was written."""
        return os.pread(self._file.fileno(), 200, 0).decode("utf-8", "replace")


def _flush() -> None:
    from modelops_runner import stdio

    stdio.flush()


def _random_state() -> dict[str, str]:
    """Return a digest of each global random state that exists in this process."""
    states: dict[str, Any] = {"random": random.getstate()}
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        states["numpy.random"] = numpy_random.get_state()
    return {name: hashlib.sha256(pickle.dumps(state)).hexdigest() for name, state in states.items()}


def _changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return sorted(name for name in before if after.get(name) != before[name])


def _context(seed: int) -> Any:
    from modelops_runner.context import Context
    from modelops_runner.reports import encoded

    return Context(
        index=0, param=0, replicate=0, seed=seed, entropy_key="00" * 16,
        checkpoint_root=None, tmpdir=tempfile.mkdtemp(), ask=lambda _method, _params: None,
        report=lambda _index, _fraction, values: encoded(values),
    )  # fmt: skip


def _files(folder: str) -> dict[str, tuple[int, int]]:
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)  # noqa: PTH118  as quick as the runner itself
            try:
                stats = os.lstat(path)
            except OSError:
                continue  # it went away while we looked
            found[os.path.relpath(path, folder)] = (stats.st_size, stats.st_mtime_ns)
    return found


def _peak_bytes() -> int:
    try:
        with open("/proc/self/status", "rb") as status:  # noqa: PTH123
            for line in status:
                if line.startswith(b"VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # no Linux
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def call_of(function: str, *args: Any) -> tuple[str, list[Any]]:
    """Return entry point and arguments of the call by which a runner calls a function of this file."""
    return "builtins:eval", [
        "__import__('runpy').run_path(path)[function](*args)",
        {"path": __file__, "function": function, "args": list(args)},
    ]
