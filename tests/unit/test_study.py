"""A study: what it accepts, what it refuses at once, and the record of a job that it becomes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modelops.bundles import Manifest, job_spec
from modelops.errors import RequestError
from modelops.states import ReplicateStatus
from modelops.study.ids import BundleDigest
from modelops.study.quantities import LONGEST_S, n_bytes, seconds
from modelops.study.sampling import grid
from modelops.study.seeds import MAX_EXPLICIT_SEED
from modelops.study.spec import NO_RETRY, Limits, RetryPolicy
from modelops.study.stopping import until
from modelops.study.study import Retry, Study

if TYPE_CHECKING:
    from collections.abc import Callable

DIGEST = BundleDigest("d" * 64)
SEIR = Manifest(
    name="seir",
    source="pyproject.toml",
    models={"simulate": "seir:simulate", "slow": "seir:slow"},
    aggregates={"summarize": "seir:summarize"},
    isolation="fork",
)


def study(**given: Any) -> Study:
    return Study(**{"bundle": "b", **given})


WRONG: list[tuple[str, Callable[[], Any], str]] = [
    ("no bundle", lambda: study(bundle=""), "bundle = '' is no path"),
    ("no replicates", lambda: study(replicates=0), "replicates must be an integer in 1.."),
    ("half a replicate", lambda: study(replicates=1.5), "replicates must be an integer"),
    ("negative seed", lambda: study(seed=-1), "seed must be an integer in 0.."),
    ("boolean seed", lambda: study(seed=True), "seed must be an integer"),
    ("no seeds", lambda: study(seeds=[]), "seeds is empty"),
    (
        "huge seed",
        lambda: study(seeds=[1, 2**63]),
        r"seeds\[1\] must be an integer in 0..9223372036854775807",
    ),
    ("text seed", lambda: study(seeds=["1"]), r"seeds\[0\] must be"),
    ("seeds and replicates", lambda: study(seeds=[1, 2], replicates=3), "replicates = 3, but 2 seeds"),
    ("seeds and seed", lambda: study(seeds=[1, 2], seed=3), "either seed or seeds"),
    ("no duration", lambda: study(timeout="soon"), "timeout = 'soon' is no duration"),
    ("negative duration", lambda: study(replicate_timeout=-1), "replicate_timeout = -1"),
    ("a timeout no clock holds", lambda: study(replicate_timeout=1e300), "is longer than 1,000,000,000 s"),
    ("infinite memory", lambda: study(memory="9" * 400 + "GB"), "is no amount"),
    ("no memory", lambda: study(memory="2 elephants"), "memory = '2 elephants' is no amount"),
    ("half a byte", lambda: study(memory=0.5), "memory = 0.5"),
    ("isolation", lambda: study(isolation="forks"), "is none of warm, fork, spawn; did you mean 'fork'"),
    ("fraction", lambda: study(min_success=1.5), "must lie in 0.0..1.0"),
    ("count", lambda: study(min_success=0), "a count must be 1 or more"),
    ("boolean", lambda: study(min_success=True), "a float is a fraction"),
    ("text", lambda: study(min_success="all"), "a float is a fraction"),
    ("retry", lambda: study(retry=3), r"write retry=mo.Retry\(max_retries="),
    ("fail_fast", lambda: study(fail_fast="yes"), "must be true or false"),
    ("max_failures", lambda: study(max_failures=-1), "max_failures must be an integer"),
    ("threads", lambda: study(threads=0), "threads must be an integer in 1.."),
    ("aggregate", lambda: study(aggregate=[3]), "aggregate = 3: it must be a name"),
    ("aggregate twice", lambda: study(aggregate=["a", "a"]), "names one twice"),
    ("parameters", lambda: study(parameters={"beta": [1]}), r"write mo.grid\(beta="),
    ("a number", lambda: study(parameters=3), "cannot be read as parameter sets"),
    ("no dicts", lambda: study(parameters=[1, 2]), "parameter set 0 is a int"),
    ("retries", lambda: Retry(max_retries=-1), "max_retries must be an integer"),
    ("backoff", lambda: Retry(backoff=0.5), "backoff must be a finite number, 1 or more"),
    ("no end", lambda: Retry(backoff=math.inf), "backoff must be a finite number, 1 or more, not inf"),
    ("no number", lambda: Retry(backoff=math.nan), "backoff must be a finite number"),
    ("huge", lambda: Retry(backoff=10**400), "backoff must be a finite number"),
    ("text", lambda: Retry(backoff="2"), "backoff must be a finite number"),  # type: ignore[arg-type]
    ("delays", lambda: Retry(initial_delay=math.inf), "initial_delay = inf is no duration"),
    ("longest", lambda: Retry(max_delay=math.nan), "max_delay = nan is no duration"),
    ("no text", lambda: study(name="\ud800"), r"name = '\\ud800' must be one line"),
    ("two lines", lambda: study(name="a\nb"), "must be one line of 1 to 500 characters"),
    ("policy", lambda: study(retry=RetryPolicy(backoff=math.inf)), "backoff must be a finite"),
    ("timeout", lambda: study(timeout=math.inf), "timeout = inf is no duration"),
    ("one's", lambda: study(replicate_timeout=math.nan), "replicate_timeout = nan is no"),
    ("memory", lambda: study(memory=math.inf), "memory = inf is no amount"),
    ("no fraction", lambda: study(min_success=math.nan), "min_success = nan"),
    ("width", lambda: study(replicates=until(half_width=math.inf, of="x")), "half_width"),
    ("level", lambda: study(replicates=until(half_width=1, of="x", level=math.nan)), "level"),
    ("on", lambda: Retry(on=["crash"]), "which is no failure; did you mean 'crashed'"),
    ("on success", lambda: Retry(on=["succeeded"]), "on has 'succeeded'"),
    ("delay", lambda: Retry(initial_delay="a while"), "initial_delay = 'a while' is no duration"),
    ("on is one", lambda: Retry(on=5), "Retry: on = 5: it must be a list of statuses"),  # type: ignore[arg-type]
    ("on nothing", lambda: Retry(on=None), "on cannot be None"),  # type: ignore[arg-type]
    ("no retries", lambda: Retry(max_retries=None), "max_retries cannot be None"),  # type: ignore[arg-type]
    ("seed", lambda: study(seeds=5), "seeds = 5: give a list with one seed per replicate; or seed"),
    ("aggregates", lambda: study(aggregate=True), "aggregate = True: it must be a name or a list"),
    ("models", lambda: study(model=["a:b"]), "model = .*it must be a name or an entry point, one"),
    ("number", lambda: study(name=0), "name = 0 must be one line"),
    ("used up", lambda: study(aggregate=iter(["a"])), "it must be a name or a list of names"),
]


@pytest.mark.parametrize(("what", "make", "says"), WRONG, ids=[w[0] for w in WRONG])
def test_what_is_wrong_is_refused_when_it_is_written(what: str, make: Callable[[], Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        make()


DURATIONS: list[tuple[Any, float]] = [
    ("12h", 43_200), ("10m", 600), ("1.5s", 1.5), ("250 ms", 0.25), ("1h30m", 5_400), ("2d", 172_800),
    ("90", 90), (90, 90), (0.5, 0.5), ("1H", 3_600), (" 5min ", 300),
]  # fmt: skip


@pytest.mark.parametrize(("written", "expected"), DURATIONS)
def test_durations(written: Any, expected: float) -> None:
    assert seconds(written, "timeout") == expected


@pytest.mark.parametrize("written", ["", "h", "1x", "1h 30", "-5s", "nan", 0, float("inf"), True, [1]])
def test_what_is_no_duration_is_refused(written: Any) -> None:
    with pytest.raises(RequestError, match="is no duration"):
        seconds(written, "timeout")


MEMORY: list[tuple[Any, int]] = [
    ("2GiB", 2**31), ("500MB", 500_000_000), ("1.5 gib", 3 * 2**29), ("4G", 2**32), ("100", 100),
    (7, 7), ("1KB", 1000),
]  # fmt: skip


@pytest.mark.parametrize(("written", "expected"), MEMORY)
def test_amounts_of_memory(written: Any, expected: int) -> None:
    assert n_bytes(written, "memory") == expected


def test_the_defaults_of_a_study_become_the_defaults_of_a_job() -> None:
    spec = job_spec(study(), SEIR, DIGEST)
    assert spec.name == spec.bundle_name == "seir"
    assert spec.bundle == DIGEST
    assert spec.model == "seir:simulate"
    assert spec.aggregates == ("seir:summarize",)
    assert spec.line.size == 1
    assert spec.isolation == "fork"
    assert spec.limits == Limits()
    assert spec.retry == NO_RETRY
    assert spec.fail_fast
    assert spec.min_success == 1.0


def test_everything_said_reaches_the_job() -> None:
    spec = job_spec(
        study(
            model="slow",
            parameters=grid(beta=[0.1, 0.2]),
            replicates=200,
            seed=7,
            aggregate=[],
            isolation="spawn",
            min_success=180,
            timeout="12h",
            replicate_timeout="10m",
            memory="2GiB",
            threads=4,
            retry=Retry(max_retries=2, initial_delay="1m", on=["failed"]),
            fail_fast=False,
            max_failures=9,
            common_random_numbers=True,
            name="mine",
        ),
        SEIR,
        DIGEST,
    )
    assert spec.model == "seir:slow"
    assert spec.aggregates == ()
    assert (spec.line.n_params, spec.line.size) == (2, 400)
    assert (spec.study_seed, spec.seeds, spec.common_random_numbers) == (7, None, True)
    assert spec.limits == Limits(replicate_timeout_s=600, memory_bytes=2**31, threads=4)
    assert spec.timeout_s == 43_200
    assert (spec.min_success, spec.needed(200)) == (180, 180)
    assert spec.retry == RetryPolicy(
        max_retries=2, initial_delay=60.0, on=frozenset({ReplicateStatus.FAILED})
    )
    assert (spec.fail_fast, spec.max_failures, spec.isolation, spec.name) == (False, 9, "spawn", "mine")


@pytest.mark.parametrize(
    ("policy", "after", "expected"),
    [
        (RetryPolicy(initial_delay=30.0, backoff=2.0), 3, 120.0),
        (RetryPolicy(initial_delay=30.0, backoff=2.0, max_delay=100.0), 3, 100.0),
        (RetryPolicy(initial_delay=0.1, backoff=2.0, max_delay=5.0), 1_100, 5.0),  # 2.0 ** 1099 is no float
        (RetryPolicy(initial_delay=1e300, backoff=1e300), 2, LONGEST_S),  # infinite, and no error
        (RetryPolicy(initial_delay=0.1, backoff=1e200), 4, LONGEST_S),
        (RetryPolicy(initial_delay=0.0, backoff=1e200), 4, 0.0),
    ],
)
def test_a_delay_is_a_number_of_seconds_however_often_it_has_grown(
    policy: RetryPolicy, after: int, expected: float
) -> None:
    assert policy.delay_s(after) == expected


def test_explicit_seeds_are_used_as_given_one_per_replicate() -> None:
    spec = job_spec(study(seeds=[11, 977, 35, MAX_EXPLICIT_SEED], parameters=grid(a=[1, 2])), SEIR, DIGEST)
    assert spec.seeds == (11, 977, 35, MAX_EXPLICIT_SEED)
    assert spec.line.size == 8


def test_a_count_that_can_never_be_reached_is_refused() -> None:
    with pytest.raises(RequestError, match="its aggregate would never run"):
        job_spec(study(replicates=5, min_success=6), SEIR, DIGEST)


def test_a_job_too_large_for_the_index_line_is_refused() -> None:
    with pytest.raises(RequestError, match="more than one job can hold"):
        job_spec(study(parameters=grid(a=range(2**22)), replicates=2**32), SEIR, DIGEST)


def test_a_parameter_file_must_have_been_read() -> None:
    with pytest.raises(RequestError, match="was not read yet"):
        job_spec(study(parameters=Path("sets.csv")), SEIR, DIGEST)


def test_what_was_said_wins_over_the_bundle_and_the_bundle_over_the_default() -> None:
    bundle = study(parameters=grid(a=[1]), replicates=50, seed=3, min_success=0.5)
    filled = study(seed=4).filled_from(bundle)
    assert (filled.seed, filled.replicates, filled.min_success) == (4, 50, 0.5)
    assert filled.sets()[0] == {"a": 1}
    assert filled.timeout is None


def test_seeds_and_replicates_are_said_together() -> None:
    explicit = study(seeds=[1, 2, 3])
    assert study(replicates=5).filled_from(explicit).seeds is None
    assert explicit.filled_from(study(replicates=5, seed=1)).n_replicates == 3
    assert study(seed=5).filled_from(explicit).n_replicates == 1
