"""What does the first outcome of a bundle cost whose imports take seconds? Goal: 1.1 times `python -c "import ..."`.

The bundle is `bundles/starsim_sir`, its environment is there and whatever Python compiles is compiled. A new process
pool gets one replicate; beside it the same Python imports the model, and imports it and runs that replicate. CPU
seconds of all processes, and on the clock until the outcome is here.

Usage: python bench/heavy_import.py [REPEATS]
"""

from __future__ import annotations

import os
import resource
import subprocess
import time
from pathlib import Path

import msgspec

from measuring import arguments, describe, folder_on_disk, show
from modelops.environments import Environment, Environments
from modelops.processes import Outcome, ProcessPool, ReplicateSet, RunnerSpec

BUNDLE = Path(__file__).parents[1] / "bundles" / "starsim_sir"
IMPORT = "import sir"
RUN = "import sir; sir.simulate({'beta': 0.1}, 1)"


def main() -> None:
    said = arguments(__doc__)
    repeats = int(said[0]) if said else 3
    cpu: dict[str, list[float]] = {"ours": [], IMPORT: [], RUN: []}
    clock: dict[str, list[float]] = {"ours": [], IMPORT: [], RUN: []}
    with folder_on_disk() as folder:
        environments = Environments(Path(folder, "cache"))
        environment = environments.ensure(environments.resolve(BUNDLE))
        ours(environment, Path(folder))
        by_hand(environment, RUN)
        for _ in range(repeats):
            for what in cpu:
                before = cpu_s()
                took = ours(environment, Path(folder)) if what == "ours" else by_hand(environment, what)
                cpu[what].append(cpu_s() - before)
                clock[what].append(took)
    for what in cpu:
        name = "a new process, and its first outcome" if what == "ours" else f'python -c "{what}"'
        show(f"{name}: CPU", cpu[what])
        show(f"{name}: on the clock", clock[what])
    describe("msgspec")


def ours(environment: Environment, folder: Path) -> float:
    """Return the seconds from asking for one replicate to its outcome."""
    spec = RunnerSpec(
        python=str(environment.python),
        environment_key=environment.key,
        environment_dir=str(environment.path),
        bundle_digest="starsim",
        snapshot=str(BUNDLE),
        isolation="warm",
        memory_bytes=None,
        replicate_timeout_s=None,
        pycache=str(folder / "pycache"),
    )
    one = ReplicateSet(
        params=msgspec.Raw(b'{"beta":0.1}'), param=0, index=0, replicate=0, seeds=(1,), entropy_key=""
    )
    outcomes: list[Outcome] = []
    with ProcessPool(folder / "pool", slots=1) as pool:
        before = time.perf_counter()
        pool.run(spec, "sir:simulate", [one], on_outcome=outcomes.append)
        seconds = time.perf_counter() - before
    assert outcomes[0].error is None, outcomes[0].error
    return seconds


def by_hand(environment: Environment, code: str) -> float:
    """Return the seconds that a bare process takes."""
    before = time.perf_counter()
    # One thread and compiled modules, as a runner has them.
    environ = {
        **os.environ,
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "",
    }
    subprocess.run([environment.python, "-c", code], cwd=BUNDLE, check=True, capture_output=True, env=environ)
    return time.perf_counter() - before


def cpu_s() -> float:
    """Return the CPU seconds of this process and of all that have ended below it."""
    own, below = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + below.ru_utime + below.ru_stime


if __name__ == "__main__":
    main()
