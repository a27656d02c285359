"""A process pool and a bundle of one module for tests: write code, run replicates of it, look at the outcomes."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING, Any

import msgspec

from modelops.processes import Outcome, ProcessPool, ReplicateSet, RunnerSpec, StopSignal

if TYPE_CHECKING:
    from pathlib import Path


class Bench:
    """A pool, a bundle, and what was printed."""

    def __init__(self, pool: ProcessPool, folder: Path) -> None:
        self.pool, self.bundle = pool, folder / "bundle"
        self.bundle.mkdir()
        self.printed: dict[int | None, bytes] = {}

    def spec(self, code: str, **changes: Any) -> RunnerSpec:
        return spec_of(self.bundle, code, **{"bundle_digest": str(hash(code)), **changes})

    def log(self, index: int | None, text: bytes) -> None:
        self.printed[index] = self.printed.get(index, b"") + text

    def run(
        self,
        spec: RunnerSpec,
        n: int = 4,
        stop: StopSignal | None = None,
        entry: str = "m:model",
        **params: Any,
    ) -> list[Outcome]:
        outcomes: list[Outcome] = []
        end = self.pool.run(
            spec, entry, sets(n, **params), on_outcome=outcomes.append, stop=stop, log=self.log
        )
        assert [o.index for o in outcomes] + list(end.unstarted) == list(range(n))
        return outcomes


def spec_of(bundle: Path, code: str, **changes: Any) -> RunnerSpec:
    """Write the module ``m`` of a bundle, and return how its processes are started: by this Python, if nothing else."""
    bundle.mkdir(exist_ok=True)
    (bundle / "m.py").write_text(textwrap.dedent(code))
    values: dict[str, Any] = {
        "python": sys.executable,
        "environment_key": "k",
        "environment_dir": None,
        "bundle_digest": "d",
        "snapshot": str(bundle),
        "isolation": "warm",
        "memory_bytes": None,
        "replicate_timeout_s": 60.0,
    }
    return RunnerSpec(**(values | changes))


def sets(n: int, **params: Any) -> list[ReplicateSet]:
    return [
        ReplicateSet(
            params=msgspec.Raw(msgspec.json.encode(params)),
            param=0,
            index=0,
            replicate=0,
            seeds=tuple(range(n)),
            entropy_key="00" * 16,
        )
    ]


def value(outcome: Outcome) -> Any:
    data = outcome.outputs[0][2]
    assert isinstance(data, bytes)
    return msgspec.json.decode(data)
