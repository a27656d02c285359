"""A job in a database and a folder whose outcomes are written here, as a worker and a driver would."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from modelops.driver.backlog import Kind
from modelops.driver.ledger import Ledger
from modelops.environments import Interpreter
from modelops.environments.lock import EMPTY, make_lock
from modelops.states import FINAL_JOB_STATES, AggregateStatus, JobEvent, ReplicateStatus
from modelops.store import (
    AggregateRow,
    AggregateWriter,
    Execution,
    Objects,
    Records,
    SegmentWriter,
    StoredError,
)
from modelops.store.contents import JobContents
from modelops.store.parameters import Parameters, write_parameters
from modelops.store.results import finalize
from modelops.store.segments import job_folder
from modelops.study.canonical import canonical_json
from modelops.study.ids import attempt_id, new_job_id
from modelops.study.index_line import IndexLine
from modelops.study.ranges import Ranges
from modelops.study.spec import JobSpec, decode_spec
from modelops.worker.sets import replicate_set
from modelops_runner.values import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from modelops.worker.messages import SegmentRef

OK = ReplicateStatus.SUCCEEDED
PYTHON = Interpreter(
    "/usr/bin/python3.12", "3.12.1", "cpython", "linux-x86_64", "2.36", "cpython-312", "/usr"
)
SUMMARIZE = "m:summarize"
Outcome = dict[str, Any] | ReplicateStatus


def model(params: Mapping[str, Any], seed: int) -> Outcome:
    """Return what a replicate gives, a function of parameters and seed as any model's."""
    if params.get("bad") and seed % 3 == 0:
        return ReplicateStatus.FAILED
    return {
        "x": float(seed) * params["a"],
        "n": seed,
        "large": bytes([seed % 251 + 1]) * 70_000 if seed % 5 == 0 else b"",
    }


class StoredJob:
    """``model`` may change between runs, as chance does."""

    def __init__(
        self,
        folder: Path,
        sets: Sequence[Mapping[str, Any]],
        n_replicates: int,
        *,
        bundle: str = "",
        **spec: Any,
    ) -> None:
        self.objects = Objects.open(folder / "objects")
        self.records = Records.open(f"sqlite:///{folder / 'modelops.db'}")
        self.job = new_job_id()
        self.model: Callable[[Mapping[str, Any], int], Outcome] = model
        self.n_ran = 0
        self._number = 0
        write_parameters(self.objects, self.job, map(canonical_json, sets))
        spec = {
            "bundle": bundle or "1",
            "aggregates": (SUMMARIZE,),
            "study_seed": 7,
            "min_success": 0.1,
            **spec,
        }
        data = msgspec.json.encode(
            JobSpec(
                name="t",
                bundle_name="b",
                model="m:f",
                line=IndexLine.of(len(sets), n_replicates),
                **spec,
            )
        )
        self.objects.put_new(f"{job_folder(self.job)}/study.json", data)
        self.objects.put_new(f"{job_folder(self.job)}/lock", make_lock(EMPTY, PYTHON).text.encode())
        self.records.create_job(self.job, data, bundle=bundle)

    @property
    def spec(self) -> JobSpec:
        """The current one, as a worker reads it: from the object that the row names."""
        return decode_spec(self.objects.get(f"{job_folder(self.job)}/{self.records.job(self.job).study}"))

    def missing(self) -> Ranges:
        """Return what this run is to run."""
        scope = self.records.scope(self.job).only
        missing = self.spec.line.all() - self.records.covered(self.job)
        return missing if scope is None else missing & scope

    def take(self) -> int:
        self._number = 0
        return self.records.take_lease(self.job, "test")

    def write(self, epoch: int, indices: Iterable[int]) -> SegmentRef:
        """Run these replicates and store their segment, without a row."""
        self._number += 1
        writer = SegmentWriter(
            self.objects, self.job, attempt_id(epoch, self._number), worker="w", host="h", pid=1
        )
        spec, parameters = self.spec, Parameters(self.objects, self.job, self.spec.parameters)
        for k in indices:
            self.n_ran += 1
            place = spec.line.locate(k)
            row = parameters[place.param]
            one = replicate_set(
                spec, place.param, row.param_id, row.canonical, index=k, replicate=place.replicate, n=1
            )
            outcome = self.model(row.values(), one.seeds[0])
            execution = Execution(1.7e9, 0.5, 0.25, 1000, 1)
            if isinstance(outcome, dict):
                writer.add(k, OK, True, [(name, *encode(v)) for name, v in outcome.items()], None, execution)
            else:
                writer.add(k, outcome, True, [], StoredError("ValueError", "bad", "tb", "", "fp"), execution)
        ref = writer.finish()
        assert ref is not None
        return ref

    def aggregate(self, epoch: int, params: Ranges) -> None:
        """Aggregate these parameter sets as a worker does, and commit."""
        contents = JobContents.of(self.objects, self.records, self.job)
        indices = Ranges(
            pair for lo, hi in params.pairs for pair in contents.spec.line.of_params(lo, hi).pairs
        )
        inputs = [i for i, ref in enumerate(contents.segments) if Ranges(ref.ranges) & indices]
        found: dict[int, int] = {}
        for i in inputs:
            for k, _, outputs in contents.read(i).rows(indices):
                (data,) = (data for name, _, data in outputs if name == "n")
                assert isinstance(data, bytes)
                found[k] = int(data)
        self._number += 1
        writer = AggregateWriter(self.objects, self.job, attempt_id(epoch, self._number))
        for param in params:
            mine = [found[k] for k in contents.spec.line.of_param(param) if k in found]
            n = len(contents.spec.line.of_param(param))
            values = {"total": sum(mine), "n": len(mine)}
            encoded = [(name, *encode(v)) for name, v in values.items()]
            writer.add(
                AggregateRow(param, SUMMARIZE, AggregateStatus.SUCCEEDED, len(mine), n, outputs=encoded)
            )
        stored = writer.finish(inputs=[contents.segments[i].digest for i in inputs])
        assert self.records.commit_aggregates(self.job, epoch, stored)

    def run(self, *, chunk: int = 7, limit: int | None = None, cancelled: bool = False) -> None:
        """Drive the job to its end; with a limit, or if it is ``cancelled`` with its last outcome, as a cancel does."""
        epoch = self.take()
        for event in (JobEvent.STARTED, JobEvent.ENVIRONMENT_READY):
            self.records.change_state(self.job, event, who="test", epoch=epoch)
        todo = self.missing() if limit is None else self.missing().take(limit)[0]
        while todo:
            head, todo = todo.take(chunk)
            assert self.records.commit_segment(self.job, epoch, self.write(epoch, head))
        ledger = self.ledger()
        settled = ledger.adopt(self.records.segments(self.job), self.records.aggregates(self.job))
        while settled:
            head, settled = settled.take(2)
            self.aggregate(epoch, head)
        complete = not self.missing() and not cancelled
        self.records.change_state(
            self.job, JobEvent.SETTLED if complete else JobEvent.CANCEL_ASKED, who="test", epoch=epoch
        )
        files = finalize(JobContents.of(self.objects, self.records, self.job))
        self.records.record_results(self.job, "test", files, epoch=epoch)
        self.records.change_state(
            self.job, JobEvent.ALL_SUCCEEDED if complete else JobEvent.STOPPED, who="test", epoch=epoch
        )
        assert self.records.job(self.job).state in FINAL_JOB_STATES

    def ledger(self) -> Ledger:
        return Ledger(self.spec)

    def lacks_aggregates(self) -> Ranges:
        """Return the parameter sets whose aggregate a driver would make."""
        ledger = self.ledger()
        ledger.adopt(self.records.segments(self.job), self.records.aggregates(self.job))
        return ledger.lacks(Kind.AGGREGATE, self.spec.line.params_of(self.spec.line.all()))

    def files(self) -> dict[str, bytes]:
        """Return the result files that are a function of the study."""
        folder = f"{job_folder(self.job)}/results"
        return {name: self.objects.get(f"{folder}/{name}.parquet") for name in ("replicates", "aggregates")}
