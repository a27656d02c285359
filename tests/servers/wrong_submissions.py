"""Submissions that are refused, and what is said of each."""

from __future__ import annotations

from typing import Any

from modelops.states import ReplicateStatus
from modelops.study.index_line import Block, IndexLine
from modelops.study.spec import Limits, RetryPolicy

NAN = float("nan")
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"format": 99}, "newer ModelOps"),
    ({"model": "model:other.thing:x"}, "has no model"),
    ({"model": "simulate"}, "is a name; write its entry point, 'model:simulate'"),
    ({"model": "sim"}, "has no model 'sim'"),
    ({"aggregates": ("summarise",)}, "has no aggregate 'summarise', did you mean|has no aggregate"),
    ({"aggregates": ("model:summarize", "model:summarize")}, "names 'model:summarize' twice"),
    ({"line": IndexLine.of(4, 4)}, "line has 4 parameter sets, but 3 were given"),
    ({"line": IndexLine((Block(0, 0, 3, 1, 4),))}, "one block"),
    ({"line": IndexLine((Block(0, 0, 3, 0, 2), Block(6, 0, 3, 2, 2)))}, "one block"),
    ({"line": IndexLine(())}, "no parameter sets"),
    ({"line": IndexLine.of(3, 0)}, "replicates must be an integer in 1..4294967296, not 0"),
    ({"line": IndexLine.of(2**30, 2**30)}, "more than one job can hold"),
    ({"seeds": (1, 2, 3)}, "seeds has 3, but there are 4 replicates"),
    ({"seeds": (1, 2, 3, -4)}, r"seeds\[3\] must be an integer in 0..9223372036854775807"),
    ({"seeds": (1, 2, 3, 2**63)}, r"seeds\[3\]"),
    ({"seeds": (1, 2, 3, 4), "study_seed": 7}, "either study_seed or seeds"),
    ({"study_seed": -1}, "study_seed"),
    ({"study_seed": 2**63}, "study_seed"),
    ({"isolation": "forked"}, "none of warm, fork, spawn"),
    ({"limits": Limits(replicate_timeout_s=0.0)}, "replicate_timeout_s"),
    ({"limits": Limits(replicate_timeout_s=NAN)}, "replicate_timeout_s"),
    ({"limits": Limits(memory_bytes=0)}, "memory_bytes"),
    ({"limits": Limits(threads=0)}, "threads"),
    ({"limits": Limits(replicate_timeout_s=1e300)}, "at most 1,000,000,000"),
    ({"timeout_s": -1.0}, "timeout_s"),
    ({"timeout_s": float("inf")}, "timeout_s"),
    ({"min_success": 1.5}, "a fraction must lie in"),
    ({"min_success": NAN}, "a fraction must lie in"),
    ({"min_success": 5}, "a parameter set has only 4 replicates"),
    ({"retry": RetryPolicy(max_retries=-1)}, "max_retries"),
    ({"retry": RetryPolicy(initial_delay=-0.1)}, "initial_delay"),
    ({"retry": RetryPolicy(max_delay=NAN)}, "max_delay"),
    ({"retry": RetryPolicy(backoff=0.5)}, "backoff must be 1 or more"),
    ({"retry": RetryPolicy(on=frozenset({ReplicateStatus.SUCCEEDED}))}, "retry.on has 'succeeded'"),
    ({"max_failures": -1}, "max_failures"),
    ({"name": ""}, "name = ''"),
    ({"name": "two\nlines"}, "one line"),
    ({"name": "\0"}, "one line"),
    ({"name": "x" * 501}, "500 characters"),
    ({"parameters": "../../other/parameters.parquet"}, "must be 'parameters.parquet'"),
]  # fmt: skip

SETS = [
    ([b'{"x":1}', b'{"x":2}', b'{"x":1}'], "parameter sets 0 and 2 are the same"),
    ([b'{"x":1}', b'{"x": 1.0}', b'{"x":1e0}'], "parameter sets 1 and 2 are the same"),
    ([b'{"seed":1}', b'{"seed":2}', b'{"seed":3}'], "cannot have the name 'seed'"),
    ([b'{"x":1}', b'{"x":2}', b'{"":3}'], "cannot have the name ''"),
    ([b'{"x":1}', b'{"x":2}', b'{"$x":3}'], "parameter set 2 cannot be used: .*must not begin with"),
    ([b'{"x":1}', b'{"x":2}', b"3"], "parameter set 2 cannot be used: not a parameter set"),
    ([b'{"x":1}', b'{"x":2}', b'{"x":{"$float":"big"}}'], "parameter set 2 cannot be used"),
    ([b'{"x":1}', b'{"x":2}', b'{"x":NaN}'], "parameter set 2 cannot be used: NaN"),
    ([b'{"x":1}', b'{"x":2}', b'{"x":"\\ud800"}'], "parameter set 2 cannot be used: .*not valid Unicode"),
    (
        [b'{"x":1}', b'{"x":2}', b'{"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}"],
        "parameter set 2 cannot be used",
    ),
    ([b'{"x":1}', b'{"x":2}', b"\xff"], "parameter set 2 cannot be used"),
]
