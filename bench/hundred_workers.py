"""A hundred workers of one machine ask for an environment at once. Goal: one build, and the last has it soon.

"Soon" is at most 1.5 times the time of the first, which is the one that builds it. The processes are there before the
clock starts; uv's cache is warm, so that the time of a build is small and what is added to it is seen.

Usage: python bench/hundred_workers.py [WORKERS [REPEATS]]
"""

from __future__ import annotations

import os
import resource
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

from measuring import arguments, describe, folder_on_disk, show
from modelops.environments import Environments

if TYPE_CHECKING:
    from modelops.environments import Lock

REQUIREMENTS = ("numpy", "pandas", "pyarrow")
ANSWER = struct.Struct("d?")


def main() -> None:
    said = arguments(__doc__)
    n_workers = int(said[0]) if said else 100
    repeats = int(said[1]) if len(said) > 1 else 5
    firsts, lasts, cpu = [], [], []
    with folder_on_disk() as folder:
        root = Path(folder)
        bundle = root / "bundle"
        bundle.mkdir()
        (bundle / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n")
        environments = Environments(root / "cache")
        lock = environments.resolve(bundle)
        environments.ensure(lock)  # fills uv's cache
        for n in range(repeats):
            cache = root / f"cache-{n}"
            Environments(cache).interpreters.all()  # once per machine, not once per build
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds, built = ask_at_once(cache, lock, n_workers)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            assert built == 1, f"{built} builds"
            firsts.append(min(seconds))
            lasts.append(max(seconds))
    first = show("the first, which builds it", firsts)
    last = show(f"the last of {n_workers}", lasts)
    show("CPU of all of them, the build included", cpu)
    print(f"one build each time; ratio of the medians: {last / first:.2f} (goal: at most 1.5)")
    describe("uv", "msgspec")


def ask_at_once(cache: Path, lock: Lock, n_workers: int) -> tuple[list[float], int]:
    """Return how long each worker waited for its environment, and how many built one."""
    gate, go = os.pipe()
    answers, answer = os.pipe()
    pids = []
    for _ in range(n_workers):
        if not (pid := os.fork()):
            os.close(go)
            os.read(gate, 1)  # until it is closed
            started = time.perf_counter()
            environment = Environments(cache).ensure(lock)
            os.write(answer, ANSWER.pack(time.perf_counter() - started, environment.built))
            os._exit(0)
        pids.append(pid)
    os.close(go)
    got = [ANSWER.unpack(os.read(answers, ANSWER.size)) for _ in pids]
    for pid in pids:
        os.waitpid(pid, 0)
    for fd in (gate, answers, answer):
        os.close(fd)
    return [seconds for seconds, _ in got], sum(built for _, built in got)


if __name__ == "__main__":
    main()
