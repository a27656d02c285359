"""Designs of parameter sets: what is in them, and what is refused."""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelops.errors import RequestError
from modelops.study.sampling import grid, ints, latin_hypercube, log_range, sobol


@given(
    st.dictionaries(
        st.sampled_from("abcde"),
        st.lists(st.integers() | st.booleans() | st.text("xyz"), min_size=1, max_size=4),
    )
)
@settings(deadline=None)
def test_a_grid_is_the_product_with_the_last_axis_fastest(axes: dict[str, list[Any]]) -> None:
    expected = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    sets = grid(**axes)
    assert list(sets) == expected
    assert len(sets) == len(expected)


def test_a_grid_takes_arrays_ranges_and_generators_and_keeps_types() -> None:
    sets = grid(a=np.array([1, 2]), b=range(2), c=(x for x in [0.5]))
    assert sets[3] == {"a": 2, "b": 1, "c": 0.5}
    assert [type(v) for v in sets[3].values()] == [int, int, float]
    assert sets[-1] == sets[3]
    with pytest.raises(IndexError):
        sets[4]


def test_a_grid_of_a_million_costs_nothing_to_make() -> None:
    sets = grid(a=range(1000), b=range(1000))
    assert len(sets) == 1_000_000
    assert sets[123_456] == {"a": 123, "b": 456}


@pytest.mark.parametrize("value", [0.3, "abc", {"lo": 1}, 7])
def test_a_single_value_is_no_axis(value: Any) -> None:
    with pytest.raises(RequestError, match=r"write beta=\["):
        grid(beta=value)


def test_an_axis_without_values_is_refused() -> None:
    with pytest.raises(RequestError, match="gamma has no values"):
        grid(beta=[1], gamma=[])


DESIGNS = [sobol, latin_hypercube]


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("n", [1, 7, 64])
def test_samples_lie_in_their_ranges_and_follow_the_seed(design: Any, n: int) -> None:
    def sample(seed: int) -> list[Any]:
        return list(design(n, seed=seed, beta=(0.1, 0.5), rate=log_range(1e-4, 1.0), k=ints(3, 5)))

    first = sample(1)
    assert first == sample(1)
    assert first != sample(2)
    assert len(first) == n
    for row in first:
        assert 0.1 <= row["beta"] < 0.5
        assert 1e-4 <= row["rate"] <= 1.0
        assert type(row["k"]) is int
        assert 3 <= row["k"] <= 5


def test_a_latin_hypercube_has_one_point_in_every_stripe() -> None:
    sets = latin_hypercube(50, seed=3, x=(0, 50), y=(0, 50))
    for name in ("x", "y"):
        assert sorted(int(row[name]) for row in sets) == list(range(50))


def test_a_sobol_sample_is_the_beginning_of_a_longer_one_of_up_to_the_next_power_of_two() -> None:
    assert list(sobol(50, seed=5, x=(0, 1), y=(2, 3))) == sobol(64, seed=5, x=(0, 1), y=(2, 3))[:50]


def test_a_log_range_puts_as_many_points_in_each_decade() -> None:
    rates = [row["rate"] for row in latin_hypercube(300, rate=log_range(1e-3, 1.0))]
    assert np.histogram(np.log10(rates), [-3, -2, -1, 0])[0].tolist() == [100, 100, 100]


def test_every_integer_of_a_range_is_as_likely() -> None:
    drawn = [row["k"] for row in latin_hypercube(300, k=ints(-1, 1))]
    assert [drawn.count(k) for k in (-1, 0, 1)] == [100, 100, 100]


WRONG: list[tuple[Any, str]] = [
    ((0.5, 0.1), "lo < hi"),
    ((0.5, 0.5), "lo < hi"),
    (0.5, "no range"),
    ((0.1, float("inf")), "no range"),
    ((0.1, float("nan")), "no range"),
    ((0.1, 0.2, 0.3), "no range"),
    (("a", "b"), "no range"),
    (log_range(0.0, 1.0), "above zero"),
    (ints(1, 2.5), "must be integers"),  # type: ignore[arg-type]  # the mistake that is tested
]


@pytest.mark.parametrize(("value", "says"), WRONG, ids=[str(w[0]) for w in WRONG])
@pytest.mark.parametrize("design", DESIGNS)
def test_a_wrong_range_is_refused_by_name(design: Any, value: Any, says: str) -> None:
    with pytest.raises(RequestError, match=f"beta = .*{says}"):
        design(8, beta=value)


@pytest.mark.parametrize("n", [0, -1, 1.5, True, None])
def test_a_wrong_number_of_points_is_refused(n: Any) -> None:
    with pytest.raises(RequestError, match="no number of parameter sets"):
        sobol(n, beta=(0, 1))


@pytest.mark.parametrize("seed", [-1, 1.5, "7", True, None])
@pytest.mark.parametrize("design", DESIGNS)
def test_a_wrong_seed_of_a_design_is_refused(design: Any, seed: Any) -> None:
    with pytest.raises(RequestError, match="is no seed"):
        design(8, seed=seed, beta=(0, 1))


def test_without_scipy_the_line_to_type_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(RequestError, match=r"pip install 'modelops\[sampling\]'"):
        sobol(8, beta=(0, 1))
