"""The sentences of `modelops bundle check`, from observations."""

from __future__ import annotations

from typing import Any

import pytest

from modelops.bundles.check import (
    FRESH,
    REORDERED,
    TWICE,
    cost,
    differences,
    imports,
    isolations,
    leaves,
    prints,
    random_state,
    reproducible,
    runs,
    seeds_differ,
    shown_bytes,
    shown_seconds,
)
from modelops.checks import CheckStatus
from modelops.processes import Outcome, ReplicateError
from modelops.states import ReplicateStatus

ONE = {"x": "json:aa", "big": "npy:bb"}
OTHER = {"x": "json:cc", "big": "npy:bb"}
QUIET: dict[str, Any] = {
    "stdout_import_bytes": 0, "stdout_bytes": 0, "stdout_text": "", "random_at_import": [], "random_state": [],
    "cwd_changed": False, "environ": [], "workdir_files": [], "n_workdir_files": 0, "tmpdir_files": [],
    "n_tmpdir_files": 0,
}  # fmt: skip


def test_outputs_differ_when_one_side_lacks_them() -> None:
    assert differences(ONE, OTHER) == ["x"]
    assert differences(ONE, {"x": "json:aa"}) == ["big"]
    assert differences({}, ONE) == ["x", "big"]


def test_a_reproducible_model_passes_and_is_told_how_it_was_tried() -> None:
    check = reproducible({7: ONE}, {TWICE: {7: ONE}, FRESH: {7: ONE}, REORDERED: {7: ONE}}, "warm")
    assert check.status is CheckStatus.OK
    assert "in a fresh process" in check.message


def test_what_differs_in_a_fresh_process_is_not_seeded() -> None:
    check = reproducible({7: ONE}, {TWICE: {7: ONE}, FRESH: {7: OTHER}, REORDERED: {7: ONE}}, "warm")
    assert check.status is CheckStatus.FAILED
    assert "in a fresh process: x" in check.message
    assert "default_rng(seed)" in check.advice
    assert check.details["differs"] == {FRESH: ["x"]}


def test_what_differs_only_behind_another_replicate_is_left_over_from_it() -> None:
    check = reproducible({7: ONE}, {TWICE: {7: OTHER}, FRESH: {7: ONE}, REORDERED: {7: OTHER}}, "warm")
    assert 'isolation = "fork"' in check.advice
    assert 'what the line "isolation" says' in check.advice  # where it cannot be forked that is "spawn"
    spawned = reproducible({7: ONE}, {TWICE: {7: OTHER}, FRESH: {7: ONE}, REORDERED: {7: OTHER}}, "spawn")
    assert "isolation" not in spawned.advice  # it would not help: nothing can be left over there


def test_a_seed_that_succeeds_only_sometimes_is_not_reproducible() -> None:
    assert reproducible({7: ONE}, {TWICE: {7: {}}}, "warm").status is CheckStatus.FAILED


def test_isolations_that_differ_are_named_and_the_one_to_take_depends_on_which() -> None:
    one, other = [{("n=1", 7): ONE}], [{("n=1", 7): OTHER}]
    same = {"warm": one, "fork": one, "spawn": one}
    assert isolations(same, "warm").status is CheckStatus.OK
    assert "polars-0" in isolations(same, "fork", "not safe: polars-0").message
    left = isolations({**same, "warm": other}, "warm")
    assert (left.status, left.details["differs"]) == (CheckStatus.WARNING, {"warm": ["x"]})
    assert 'isolation = "fork"' in left.advice
    assert 'isolation = "spawn"' in isolations({**same, "warm": other}, "warm", "not safe").advice
    assert isolations({**same, "warm": other}, "spawn").status is CheckStatus.OK
    per_process = isolations({**same, "fork": other}, "fork")
    assert (per_process.status, "seed" in per_process.advice) == (CheckStatus.WARNING, True)


def test_an_order_or_a_set_that_differs_is_named_although_another_is_the_same() -> None:
    one, two = ("n=1", 7), ("n=2", 7)
    alone = [{one: ONE, two: ONE}]
    warm = [{one: ONE, two: ONE}, {two: OTHER}]
    check = isolations({"warm": warm, "fork": alone, "spawn": alone}, "warm")
    assert check.status is CheckStatus.WARNING
    assert check.message == "warm gives other outputs than spawn: x with n=2"


def test_seeds_that_change_nothing_are_a_warning() -> None:
    assert seeds_differ({1: ONE, 2: ONE}).status is CheckStatus.WARNING
    assert seeds_differ({1: ONE, 2: OTHER}).status is CheckStatus.OK


def test_outputs_that_differ_for_one_seed_tell_nothing_about_seeds() -> None:
    check = seeds_differ({1: ONE, 2: OTHER}, unreliable={"x"})
    assert check.status is CheckStatus.WARNING
    assert "cannot be told" in check.message


def test_a_missing_module_comes_with_the_line_that_brings_it() -> None:
    error = {"type": "ModuleNotFoundError", "message": "No module named 'sklearn'", "missing_module": "sklearn.svm",
             "file": "model.py", "line": 3}  # fmt: skip
    check = imports([("model", "model:simulate"), ("aggregate", "model:summarize")], [error, {}])
    assert check.status is CheckStatus.FAILED
    assert "No module named 'sklearn' at model.py:3" in check.message
    assert '"scikit-learn"' in check.advice


def test_a_failed_replicate_is_named_by_its_parameters_and_its_place() -> None:
    error = ReplicateError(type="ValueError", message="beta is negative", file="model.py", line=9)
    outcomes = [Outcome(index=0, status=ReplicateStatus.SUCCEEDED),
                Outcome(index=1, status=ReplicateStatus.FAILED, error=error)]  # fmt: skip
    check = runs(outcomes, {0: "beta=1, seed 3", 1: "beta=-1, seed 4"})
    assert check.status is CheckStatus.FAILED
    assert "1 of 2 replicates" in check.message
    assert "beta=-1, seed 4: failed: ValueError: beta is negative at model.py:9" in check.message


def test_prints_are_multiplied_by_the_replicates_of_the_job() -> None:
    check = prints({**QUIET, "stdout_bytes": 1024, "stdout_text": "day 1\nday 2\n"}, 4000)
    assert check.status is CheckStatus.WARNING
    assert "1.0 KiB in each replicate, 3.9 MiB in a job of 4,000 ('day 1'" in check.message
    assert prints(QUIET, 4000).status is CheckStatus.OK


def test_a_shared_generator_is_a_warning_that_names_it() -> None:
    check = random_state({**QUIET, "random_state": ["numpy.random"], "random_at_import": ["random"]})
    assert check.status is CheckStatus.WARNING
    assert "a replicate changes that of numpy.random and the import changes that of random" in check.message


def test_what_is_left_behind_is_for_information() -> None:
    seen = {**QUIET, "workdir_files": ["a.csv"], "n_workdir_files": 1, "environ": ["FOO"]}
    check = leaves(seen)
    assert check.status is CheckStatus.OK
    assert "writes 1 file to its working directory (a.csv)" in check.message
    assert "FOO" in check.message


def test_the_cost_of_a_replicate_gives_the_length_of_the_job() -> None:
    time, memory, job = cost(
        first_s=3.0, seconds=[0.1, 0.2, 9.0], peak_bytes=100 << 20, n_replicates=4000, cores=2,
        available_bytes=8 << 30,
    )  # fmt: skip
    assert "200 ms per replicate" in time.message
    assert memory.status is CheckStatus.OK
    assert job.details["seconds"] == pytest.approx(3.0 + 4000 * 0.2 / 2)


def test_more_memory_than_is_free_is_a_warning_with_the_number_of_workers_that_fit() -> None:
    _, memory, _ = cost(
        first_s=1.0, seconds=[1.0], peak_bytes=5 << 30, n_replicates=10, cores=2, available_bytes=8 << 30
    )
    assert memory.status is CheckStatus.WARNING
    assert "--workers 1" in memory.advice


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.00042, "420 us"), (0.0125, "12 ms"), (1.25, "1.2 s"), (100, "100 s"), (600, "10 min"), (3 * 3600, "3.0 h")],
)  # fmt: skip
def test_durations_are_said_as_people_say_them(value: float, said: str) -> None:
    assert shown_seconds(value) == said


@pytest.mark.parametrize(
    ("value", "said"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (200 << 20, "200 MiB")]
)
def test_amounts_are_said_as_people_say_them(value: int, said: str) -> None:
    assert shown_bytes(value) == said
