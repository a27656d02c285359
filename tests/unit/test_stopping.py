"""The rule of ``until``: when a parameter set has enough replicates."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from doc_tables import rows_below
from hypothesis import given
from hypothesis import strategies as st

import modelops as mo
from modelops.client.study_arguments import replicates_of_text
from modelops.client.study_files import load_study
from modelops.errors import ModelOpsError, RequestError
from modelops.study.extension import extended_spec
from modelops.study.index_line import IndexLine
from modelops.study.spec import WITH_UNTIL, JobSpec, decode_spec
from modelops.study.stopping import MAX_OF_UNTIL, Until
from modelops.study.student_t import EXTREME, LARGE, t_quantile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

PAGE = "until.md"
OUTCOMES = st.lists(st.one_of(st.none(), st.floats(-3, 3), st.just(math.nan)), max_size=60)


def rule(**said: Any) -> Until:
    made: Until = mo.until(**{"half_width": 0.5, "of": "x", "min": 4, "max": 50, **said})
    return made


LEVELS = [
    1e-6,
    0.01,
    0.5,
    0.8,
    0.9,
    0.95,
    0.99,
    0.999,
    EXTREME,
    math.nextafter(EXTREME, 1),
    1 - 1e-9,
    1 - 1e-15,
]


@pytest.mark.parametrize("level", [*LEVELS, math.nextafter(1, 0)])
def test_the_quantile_of_student_is_that_of_scipy(level: float) -> None:
    stats, special = pytest.importorskip("scipy.stats"), pytest.importorskip("scipy.special")
    for df in (1, 2, 3, 4, 5, 10, 49, 50, 333, LARGE - 1, LARGE, 5000, 10**6):
        if (
            level > 0.5
        ):  # each of scipy's ways is exact only where it looks at the small one of two probabilities
            expected = stats.t.isf((1 - level) / 2, df)
        else:
            inside = special.betaincinv(0.5, df / 2, level)
            expected = math.sqrt(df * inside / (1 - inside))
        assert t_quantile(level, df) == pytest.approx(expected, rel=6e-10), df


def test_the_page_has_the_quantiles_and_half_widths_that_are_computed() -> None:
    for level, df, expected in rows_below(PAGE, "| level | degrees of freedom"):
        assert t_quantile(float(level), int(df)) == float(expected)
    for level, values, expected in rows_below(PAGE, "| level | values"):
        numbers = [float(x) for x in values.split(", ")]
        assert rule(level=float(level)).half_width_of(numbers) == float(expected)


def test_the_page_has_the_prefixes_that_are_looked_at() -> None:
    for low, high, lengths in rows_below(PAGE, "| min | max | prefixes"):
        assert [*rule(min=int(low), max=int(high)).looks()] == [int(n) for n in lengths.split(", ")]


def test_the_page_has_the_decisions() -> None:
    for outcomes, needed in rows_below(PAGE, "| outcomes | needed"):
        seen = [None if word == "failed" else float(word) for word in outcomes.split(", ")]
        made = mo.until(half_width=1.0, of="x", level=0.9, min=3, max=8).needed(seen)
        assert made == (None if needed == "more" else int(needed)), outcomes


def test_prefixes_grow_by_a_tenth_and_end_at_max() -> None:
    looks = [*rule(min=50, max=2000).looks()]
    assert (looks[0], looks[-1], len(looks)) == (50, 2000, 41)
    assert all(b - a <= max(1, a // 10) for a, b in pairwise(looks))


@given(outcomes=OUTCOMES, more=OUTCOMES, half_width=st.floats(0.01, 3))
def test_a_decision_does_not_change_with_what_comes_after(
    outcomes: list[float | None], more: list[float | None], half_width: float
) -> None:
    until = rule(half_width=half_width)
    decided = until.needed(outcomes)
    if decided is not None:
        assert decided <= len(outcomes)
        assert until.needed(outcomes + more) == decided
        assert until.needed(outcomes[:decided]) == decided
        assert until.needed(outcomes[: decided - 1]) is None


def test_replicates_that_did_not_succeed_are_left_out_and_do_not_count_for_min() -> None:
    assert rule().needed([1.0] * 4) == 4
    assert rule().needed([1.0, None, 1.0, 1.0]) is None
    assert rule().needed([1.0, None, 1.0, 1.0, 1.0]) == 5
    assert rule(max=6).needed([None] * 6) == 6


def test_what_is_not_finite_has_no_interval_so_the_set_gets_max() -> None:
    for odd in (math.nan, math.inf, -math.inf):
        assert rule().needed([1.0] * 49 + [odd]) == 4, "beyond the prefix it is not seen"
        assert rule().needed([odd] + [1.0] * 49) == 50
    assert rule().half_width_of([1e308, -1e308] * 4) == math.inf


@pytest.mark.parametrize(("half_width", "size"), [(0.01, 1e153), (1e-300, 1.0), (1e-160, 1e140)])
def test_a_prediction_beyond_what_floats_hold_is_max(half_width: float, size: float) -> None:
    assert rule(half_width=half_width).predicted([size, -size] * 10) == 50
    assert rule(half_width=half_width).needed([size, -size] * 25) == 50


def test_an_output_that_never_varies_needs_min() -> None:
    assert rule(half_width=1e-300).needed([0.25] * 50) == 4


def covered(draw: Callable[[tuple[int, int]], npt.NDArray[np.float64]], mean: float, until: Until) -> float:
    """Return how often the interval around the mean of the needed replicates holds the true mean."""
    found = []
    for values in draw((1500, until.max)).tolist():
        n = until.needed(values)
        assert n is not None
        assert n < until.max
        found.append(abs(sum(values[:n]) / n - mean) <= until.half_width)
    return float(sum(found) / len(found))


@pytest.mark.parametrize(
    ("name", "half_width"), [("normal", 0.014), ("yes or no, p = 0.3", 0.09), ("exponential", 0.025)]
)
def test_the_interval_covers_the_true_mean_as_often_as_said(name: str, half_width: float) -> None:
    rng = np.random.default_rng(20)
    draws: dict[str, tuple[Callable[[tuple[int, int]], Any], float]] = {
        "normal": (lambda shape: rng.normal(0.3, 0.07, shape), 0.3),
        "yes or no, p = 0.3": (lambda shape: (rng.random(shape) < 0.3).astype(float), 0.3),
        "exponential": (lambda shape: rng.exponential(0.2, shape), 0.2),
    }
    draw, mean = draws[name]
    share = covered(draw, mean, mo.until(half_width=half_width, of="x", max=600))
    assert 0.925 <= share <= 0.98  # the standard error of 1,500 at 0.95 is 0.006


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ({"half_width": 0}, "half_width"),
        ({"half_width": math.nan}, "half_width"),
        ({"half_width": "small"}, "half_width"),
        ({"half_width": 10**400}, "half_width"),
        ({"level": 10**400}, "level"),
        ({"of": ""}, "of"),
        ({"of": 3}, "of"),
        ({"level": 1.0}, "level"),
        ({"level": 95}, "level"),
        ({"min": 1}, "min"),
        ({"min": 2.5}, "min"),
        ({"min": 60}, "max must be an integer in 60"),
        ({"max": MAX_OF_UNTIL + 1}, "max"),
    ],
)
def test_what_cannot_be_kept_to_is_refused_by_name(said: dict[str, Any], names: str) -> None:
    with pytest.raises(RequestError, match=f"until: {re.escape(names)}"):
        rule(**said)


def test_it_is_written_in_a_study_file_and_on_a_command_line(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text('bundle = "b"\nreplicates = { half_width = 0.01, of = "attack_rate", max = 300 }\n')
    expected = mo.until(half_width=0.01, of="attack_rate", max=300)
    assert load_study(file).replicates == expected
    assert load_study(file).n_replicates == 300
    assert replicates_of_text("until:half_width=0.01,of=attack_rate,max=300") == expected
    assert replicates_of_text("200") == 200


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("many", "-n 200, or as in -n until:half_width=0.01,of=attack_rate"),
        ("until:", "-n until:half_width=0.01,of=attack_rate"),
        ("until:half_width=0.1", "needs of"),
        ("until:half_widht=0.1,of=x", "did you mean 'half_width'"),
        ("until:half_width=wide,of=x", "half_width must be a number"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_to_write(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=re.escape(said)):
        replicates_of_text(text)


def test_seeds_given_one_by_one_are_as_many_as_max() -> None:
    assert mo.Study(bundle="b", replicates=rule(max=5), seeds=[1, 2, 3, 4, 5]).n_replicates == 5
    with pytest.raises(ModelOpsError, match="max = 50, but 2 seeds"):
        mo.Study(bundle="b", replicates=rule(), seeds=[1, 2])


def spec_of(until: Until | None) -> JobSpec:
    line = IndexLine.of(3, 50)
    form = 1 if until is None else WITH_UNTIL
    return JobSpec(format=form, name="n", bundle="b", bundle_name="b", model="m:f", line=line, until=until)


def test_it_is_part_of_the_record_of_a_job_and_older_records_have_none() -> None:
    spec = spec_of(rule())
    assert decode_spec(msgspec.json.encode(spec)) == spec
    old = msgspec.json.decode(msgspec.json.encode(spec_of(None)))
    del old["until"]
    assert decode_spec(msgspec.json.encode(old)).until is None


def test_extending_a_job_raises_max() -> None:
    extended = extended_spec(spec_of(rule()), replicates=80)
    assert extended.until == rule(max=80)
    assert extended.line.size == 3 * 80
    assert extended_spec(spec_of(rule()), n_more_params=2).until == rule()
