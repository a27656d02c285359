"""The environment variables of a runner: an allow-list, so that no secret of the worker reaches a bundle."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PASSED = ("PATH", "HOME", "LANG", "LANGUAGE", "TZ", "USER", "LOGNAME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
# How many threads a library uses can change results (order of sums), so it is part of what we fix.
THREAD_LIMITS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "GOTO_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "ACCELERATE_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "POLARS_MAX_THREADS",
    "RAYON_NUM_THREADS",
    "TBB_NUM_THREADS",
    "JULIA_NUM_THREADS",
    "ARROW_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)


def runner_environ(
    worker: Mapping[str, str],
    *,
    environment_dir: str | None,
    threads: int,
    tmpdir: Path,
    cache_dir: Path,
    pycache: str | None,
    extra: tuple[tuple[str, str], ...] = (),
) -> dict[str, str]:
    """Return the variables of a runner.

    Parameters
    ----------
    worker
        The variables of the worker; only those named in `PASSED` and ``LC_*`` are taken.
    environment_dir
        The bundle's environment; its ``bin`` comes first in ``PATH``.
    cache_dir
        Private folder for what libraries cache (numba, matplotlib).
    extra
        Variables that the bundle asks for; they win.
    """
    env = {name: worker[name] for name in PASSED if name in worker}
    env.update({name: value for name, value in worker.items() if name.startswith("LC_")})
    if not any(name in env for name in ("LANG", "LC_ALL", "LC_CTYPE")):
        env["LC_CTYPE"] = "C.UTF-8"  # the same text encoding on every machine
    if environment_dir is not None:
        env["VIRTUAL_ENV"] = environment_dir
        env["PATH"] = os.pathsep.join(filter(None, [os.path.join(environment_dir, "bin"), env.get("PATH")]))  # noqa: PTH118
    env.update(dict.fromkeys(THREAD_LIMITS, str(threads)))
    env.update(
        TMPDIR=str(tmpdir),
        PYTHONHASHSEED="0",  # the order of sets is part of a result
        PYTHONNOUSERSITE="1",
        PYTHONFAULTHANDLER="1",  # a segfault leaves the Python stack in stderr
        MPLBACKEND="Agg",
        MPLCONFIGDIR=str(cache_dir / "matplotlib"),
        NUMBA_CACHE_DIR=str(cache_dir / "numba"),
    )
    if pycache is not None:
        env["MODELOPS_PYCACHE"] = pycache
    env.update(extra)
    return env
