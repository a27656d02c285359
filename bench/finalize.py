"""How long does it take to turn committed segments into result files? Microseconds per replicate.

Usage: python bench/finalize.py [--rows 1000000] [--segment 1000] [--params 20] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from measuring import describe, folder_on_disk
from modelops.states import ReplicateStatus
from modelops.store import Execution, Objects, SegmentWriter
from modelops.store.contents import JobContents
from modelops.store.parameters import write_parameters
from modelops.store.results import finalize
from modelops.study.canonical import canonical_json
from modelops.study.ids import JobId, attempt_id, new_job_id
from modelops.study.index_line import IndexLine
from modelops.study.spec import JobSpec

if TYPE_CHECKING:
    from modelops.worker.messages import SegmentRef


def write_job(objects: Objects, job: JobId, n_params: int, n_rows: int, per_segment: int) -> list[SegmentRef]:
    write_parameters(
        objects, job, (canonical_json({"beta": 0.1 + i / n_params, "n": i}) for i in range(n_params))
    )
    rng = random.Random(1)
    values = [
        [(name, "json", msgspec.Raw(repr(rng.random()).encode())) for name in ("a", "b", "c", "d", "e")]
        for _ in range(min(n_rows, 10_000))
    ]
    refs, adding_s, finishing_s = [], 0.0, 0.0
    for lo in range(0, n_rows, per_segment):
        writer = SegmentWriter(objects, job, attempt_id(1, lo), worker="w", host="h", pid=1)
        started = time.perf_counter()
        for k in range(lo, min(lo + per_segment, n_rows)):
            execution = Execution(1.7e9, 0.01, 0.01)
            writer.add(k, ReplicateStatus.SUCCEEDED, True, values[k % len(values)], None, execution)
        added = time.perf_counter()
        ref = writer.finish()
        assert ref is not None
        refs.append(ref)
        adding_s += added - started
        finishing_s += time.perf_counter() - added
    print(
        f"add: {adding_s / n_rows * 1e6:.2f} us per row, finish: {finishing_s / n_rows * 1e6:.2f} us per row"
    )
    return refs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--segment", type=int, default=1_000)
    parser.add_argument("--params", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with folder_on_disk() as folder:
        objects, job = Objects.open(Path(folder)), new_job_id()
        refs = write_job(objects, job, args.params, args.rows, args.segment)
        spec = JobSpec(
            name="bench",
            bundle="sha256:0",
            bundle_name="bench",
            model="bench:model",
            line=IndexLine.of(args.params, args.rows // args.params),
        )
        before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        times, cpu = [], []
        for _ in range(args.repeats):
            started, started_cpu = time.perf_counter(), time.process_time()
            finalize(JobContents(objects, job, spec, refs, rest=ReplicateStatus.NOT_RUN))
            times.append((time.perf_counter() - started) / args.rows * 1e6)
            cpu.append((time.process_time() - started_cpu) / args.rows * 1e6)
        grown_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before_bytes
    print(
        json.dumps(
            {
                "us_per_row": [round(t, 3) for t in times],
                "cpu_us_per_row": [round(t, 3) for t in cpu],
                "peak_memory_grew_mib": round(grown_bytes / 2**20),
                **vars(args),
            }
        )
    )
    describe("pyarrow", "msgspec")


if __name__ == "__main__":
    main()
