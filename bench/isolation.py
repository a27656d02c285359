"""What does a fresh state cost? `warm`, `fork` and `spawn` with numpy and pandas imported. Goal: fork at most 5 ms.

The model does nothing and returns five floats. Each repeat runs all rows, one after another; CPU time is that of all
processes together, from runs of different length, so that starting and importing are not in it (but for `spawn`,
which is nothing else). Beside it what one would pick instead, in the same Python: `multiprocessing.Process` for every
call, forked or spawned, which sends its result through a pipe; nothing is checked, limited or cleaned there.

Usage: python bench/isolation.py [REPEATS]
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import time
from pathlib import Path

import msgspec

from measuring import arguments, describe, folder_on_disk
from modelops.environments import Environment, Environments
from modelops.processes import Outcome, ProcessPool, ReplicateSet, RunnerSpec

N = {"warm": 4_000, "fork": 1_000, "spawn": 4}  # replicates
MODEL = """
import numpy, pandas
OUT = {f"output_{i}": i / 7 for i in range(5)}
def simulate(params, seed):
    return OUT
"""
BY_HAND = """
import json, multiprocessing, sys, time
from noop import simulate
def work(pipe, seed): pipe.send(simulate({}, seed))
def call(context, seed):
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(theirs, seed))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result
if __name__ == "__main__":
    context, n = multiprocessing.get_context(sys.argv[1]), int(sys.argv[2])
    call(context, 0)
    before = time.perf_counter()
    for seed in range(n): call(context, seed)
    print(json.dumps(time.perf_counter() - before))
"""


def main() -> None:
    said = arguments(__doc__)
    repeats = int(said[0]) if said else 5
    rows: dict[str, list[tuple[float, float]]] = {}
    with folder_on_disk() as folder:
        bundle = Path(folder, "bundle")
        bundle.mkdir()
        (bundle / "requirements.txt").write_text("numpy\npandas\n")
        (bundle / "noop.py").write_text(MODEL)
        (bundle / "by_hand.py").write_text(BY_HAND)
        environments = Environments(Path(folder, "cache"))
        environment = environments.ensure(environments.resolve(bundle))
        ours(environment, bundle, Path(folder), "warm", 1)  # compiles what is imported
        for _ in range(repeats):
            for isolation, n in N.items():
                rows.setdefault(isolation, []).append(ours(environment, bundle, Path(folder), isolation, n))
            for method in ("fork", "spawn"):
                name = f"multiprocessing.Process, {method}"
                rows.setdefault(name, []).append(theirs(environment, bundle, method, N[method]))
        version = "import numpy, pandas; print(f'numpy {numpy.__version__}, pandas {pandas.__version__}')"
        subprocess.run([environment.python, "-W", "ignore", "-c", version], check=True)
    print(f"{'':32} {'ms':>9} {'CPU ms':>9}  every repeat, CPU ms")
    medians: dict[str, tuple[float, float]] = {}
    for name, measured in rows.items():
        wall, cpu = (statistics.median(column) for column in zip(*measured, strict=True))
        medians[name] = wall, cpu
        print(f"{name:32} {wall:9.3f} {cpu:9.3f}  {' '.join(f'{c:.3f}' for _, c in measured)}")
    above, above_cpu = (f - w for f, w in zip(medians["fork"], medians["warm"], strict=True))
    print(
        f"fork costs {above:.2f} ms above warm (goal: at most 5 ms), {above_cpu:.2f} ms of CPU; "
        f"spawn {medians['spawn'][0] / medians['fork'][0]:.0f} times as much as fork"
    )
    describe("msgspec")


def ours(environment: Environment, bundle: Path, folder: Path, isolation: str, n: int) -> tuple[float, float]:
    """Return milliseconds per replicate, on the clock and of CPU."""
    spec = RunnerSpec(
        python=str(environment.python),
        environment_key=environment.key,
        environment_dir=str(environment.path),
        bundle_digest="noop",
        snapshot=str(bundle),
        isolation=isolation,
        memory_bytes=None,
        replicate_timeout_s=600.0,
        pycache=str(folder / "pycache"),
    )

    def replicates(pool: ProcessPool, n: int) -> float:
        one = ReplicateSet(
            params=msgspec.Raw(b"{}"), param=0, index=0, replicate=0, seeds=tuple(range(n)), entropy_key=""
        )
        outcomes: list[Outcome] = []
        before = time.perf_counter()
        pool.run(spec, "noop:simulate", [one], on_outcome=outcomes.append)
        seconds = time.perf_counter() - before
        assert [o.error for o in outcomes] == [None] * n
        return seconds

    cpu, seconds = [], 0.0
    for some in (0, n):
        before = cpu_s()
        with ProcessPool(folder / "pool", slots=1) as pool:
            replicates(pool, 1)
            if some:
                seconds = replicates(pool, some)
            assert pool.not_forked(spec) is None
        cpu.append(cpu_s() - before)
    return seconds / n * 1e3, (cpu[1] - cpu[0]) / n * 1e3


def theirs(environment: Environment, bundle: Path, method: str, n: int) -> tuple[float, float]:
    """Return the same of a `multiprocessing.Process` per call."""
    cpu, seconds = [], 0.0
    for some in (0, n):
        before = cpu_s()
        command = [environment.python, "-W", "ignore", "by_hand.py", method, str(some)]
        environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=bundle, check=True, stdout=subprocess.PIPE, env=environ)
        seconds = json.loads(done.stdout)
        cpu.append(cpu_s() - before)
    return seconds / n * 1e3, (cpu[1] - cpu[0]) / n * 1e3


def cpu_s() -> float:
    """Return the CPU seconds of this process and of all that have ended below it."""
    own, below = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + below.ru_utime + below.ru_stime


if __name__ == "__main__":
    main()
