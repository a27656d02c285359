"""How soon does a worker that has never run a bundle hand in its first outcome? Goal: at most 0.25 s.

Environment warm, bundle without dependencies. Each repeat has a new cluster with new worker processes: from
submitting a chunk of one replicate to a worker that knows nothing of the job, until its receipt is here, whose
segment is then stored and synced. In it are loading the job's record, checking the snapshot and the environment,
starting a runner, the handshake, the import, the replicate, and the segment. Beside it: the same chunk when the
runner is warm; and what one would do without ModelOps, `subprocess.run` of the environment's Python that imports
the model, calls it and prints its outputs.

Usage: python bench/first_outcome.py [REPEATS]
"""

from __future__ import annotations

import subprocess
import time
from contextlib import closing
from pathlib import Path

import modelops as mo
from measuring import arguments, describe, folder_on_disk, show
from modelops.client.prepare import prepare_job
from modelops.cluster.embedded import EmbeddedCluster
from modelops.environments import Environments
from modelops.home import Home
from modelops.store import Objects, Records
from modelops.store.segments import job_folder
from modelops.study.ids import AttemptId
from modelops.worker import tasks
from modelops.worker.messages import Chunk, Receipt

PYPROJECT = """
[project]
name = "plain"
version = "1.0"
requires-python = ">=3.11"
[tool.modelops]
model = "plain:simulate"
"""
MODEL = "def simulate(params, seed):\n    return {'seed': seed, 'x': seed / 3}\n"
BY_HAND = (
    "import json, sys; sys.path.insert(0, {!r}); import plain; print(json.dumps(plain.simulate({{}}, 1)))"
)


def main() -> None:
    said = arguments(__doc__)
    repeats = int(said[0]) if said else 7
    first, second, by_hand = [], [], []
    with folder_on_disk() as folder:
        bundle = Path(folder, "plain")
        bundle.mkdir()
        (bundle / "pyproject.toml").write_text(PYPROJECT)
        (bundle / "plain.py").write_text(MODEL)
        home = Home.at(Path(folder, "home"))
        objects = Objects.open(str(home.objects))
        environments = Environments(home.cache)
        lock = environments.resolve(bundle)
        python = environments.ensure(lock).python
        with closing(Records.open(home.database_url)) as records:
            for n in range(repeats):
                prepared = prepare_job(mo.Study(bundle=bundle, seeds=[n, n + 1]), home, records, objects)
                objects.put_new(f"{job_folder(prepared.job)}/lock", lock.text.encode())
                with EmbeddedCluster(home, n_workers=1) as cluster:
                    for k, seconds in enumerate((first, second)):
                        chunk = Chunk(
                            job=prepared.job,
                            attempt=AttemptId(f"0001-{k:06d}"),
                            epoch=1,
                            ranges=((k, k + 1),),
                        )
                        started = time.perf_counter()
                        receipt: Receipt = cluster.client.submit(tasks.simulate, chunk, pure=False).result()
                        seconds.append(time.perf_counter() - started)
                        assert receipt.segment is not None
                        assert receipt.segment.counts == {"succeeded": 1}
                started = time.perf_counter()
                program = [python, "-c", BY_HAND.format(str(bundle))]
                subprocess.run(program, check=True, capture_output=True)
                by_hand.append(time.perf_counter() - started)
    median = show("first outcome on a worker that knows nothing", first)
    show("the next one, on the warm runner", second)
    hand = show("by hand: a bare subprocess, nothing checked, nothing stored", by_hand)
    print(
        f"first outcome: {median:.3f} s (goal: at most 0.25 s), {median / hand:.1f} times a bare subprocess"
    )
    describe("distributed", "msgspec", "pyarrow")


if __name__ == "__main__":
    main()
