"""The sentences of `modelops bundle check`."""

from __future__ import annotations

import pytest

from modelops.bundles.check import (
    Finding,
    Level,
    Outputs,
    check_cost,
    check_global_random,
    check_other_seeds,
    check_same_seed,
    check_stdout,
    differing,
    duration,
    passed,
    report_lines,
)

ONE: Outputs = [["x", "json", "1"], ["big", "npy", {"path": "/spool/a", "bytes": 9, "sha256": "aa"}]]


def with_x(text: str) -> Outputs:
    return [["x", "json", text], ONE[1]]


def test_outputs_are_compared_as_bytes_and_large_ones_by_digest() -> None:
    moved: Outputs = [ONE[0], ["big", "npy", {"path": "/spool/b", "bytes": 9, "sha256": "aa"}]]
    assert differing(ONE, moved) == []
    assert differing(ONE, with_x("1.0")) == ["x"]
    assert differing(ONE, [ONE[0], ["big", "npy", {"path": "/spool/a", "bytes": 9, "sha256": "bb"}]]) == [
        "big"
    ]
    assert differing(ONE, [ONE[0]]) == ["big"]
    assert differing([["x", "json", '{"$float":"nan"}']], [["x", "json", '{"$float":"nan"}']]) == []


def test_a_result_that_differs_is_named_with_the_run_and_the_likely_cause() -> None:
    runs = {"first": ONE, "again in the same process": ONE, "in a fresh process": with_x("2")}
    finding = check_same_seed(runs)
    assert finding.level is Level.PROBLEM
    assert finding.text == "the same seed gives another result in a fresh process: 'x'"
    assert "hash()" in finding.advice
    assert not passed([finding])
    leak = check_same_seed({"first": ONE, "in another order": with_x("2")})
    assert 'isolation = "fork"' in leak.advice


def test_a_reproducible_model_passes() -> None:
    finding = check_same_seed({"first": ONE, "in a fresh process": ONE})
    assert finding == Finding(Level.OK, "the same seed gives the same result (in a fresh process)")


def test_seeds_that_change_nothing_are_a_warning() -> None:
    assert check_other_seeds([ONE, ONE, ONE]).level is Level.WARNING
    assert check_other_seeds([ONE, ONE, with_x("2")]).level is Level.OK


def test_printing_and_the_global_random_state_are_noted() -> None:
    assert check_stdout("").level is Level.OK
    assert "prints 2 lines per replicate (first: 'a')" in check_stdout("a\nb\n").text
    assert check_global_random([]).level is Level.OK
    assert "'numpy.random', 'random'" in check_global_random(["random", "numpy.random"]).text


def test_the_cost_of_a_replicate_gives_the_length_of_the_job() -> None:
    finding = check_cost([0.1, 0.2, 9.0], 100 << 20, n_replicates=4000, slots=2, memory_bytes=8 << 30)
    assert finding.text == (
        "one replicate takes 200 ms and 100 MiB; "
        "4000 of them take about 6 min 40 s on this machine (2 at once)"
    )
    assert finding.level is Level.OK
    large = check_cost([1.0], 5 << 30, n_replicates=1, slots=2, memory_bytes=8 << 30)
    assert large.level is Level.WARNING
    assert "enough for 1 at once" in large.advice


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.00042, "0.42 ms"),
        (0.0995, "100 ms"),
        (1.25, "1.2 s"),
        (12.4, "12 s"),
        (59.7, "1 min"),
        (200, "3 min 20 s"),
        (3599.7, "1 h"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_the_report_has_a_line_per_finding_and_one_for_its_advice() -> None:
    findings = [Finding(Level.OK, "imports"), Finding(Level.PROBLEM, "differs", "fix it")]
    assert report_lines(findings) == ["      ok  imports", " problem  differs", "          -> fix it"]
