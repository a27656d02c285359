"""Histograms as Prometheus reads them, and what workers hand on to the process that is asked for it."""

from __future__ import annotations

import re

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from modelops.counters import EDGES, Durations, Measured, Totals
from modelops.metrics_text import histogram, of_processes
from modelops.store.segments import _durations_of

SECONDS = st.lists(st.floats(0, 1e6) | st.sampled_from(EDGES[Measured.REPLICATES]), max_size=30)


def durations(seconds: list[float]) -> Durations:
    return _durations_of(np.array(seconds, np.float64))


@given(SECONDS)
def test_each_bucket_counts_what_took_at_most_so_long(seconds: list[float]) -> None:
    text = histogram("x_seconds", "How long.", Measured.REPLICATES, durations(seconds))
    buckets = re.findall(r'^x_seconds_bucket\{le="([^"]+)"\} (\d+)$', text, re.MULTILINE)
    assert [le for le, _ in buckets] == [*map(str, EDGES[Measured.REPLICATES]), "+Inf"]
    for le, n in buckets:
        assert int(n) == sum(s <= float(le) for s in seconds)
    assert f"x_seconds_count {len(seconds)}\n" in text
    (total,) = re.findall(r"^x_seconds_sum (\S+)$", text, re.MULTILINE)
    np.testing.assert_allclose(float(total), sum(seconds), atol=1e-6)


@given(SECONDS, SECONDS)
def test_what_two_processes_measured_is_what_one_would_have(one: list[float], other: list[float]) -> None:
    both = durations(one) + durations(other)
    whole = durations([*one, *other])
    assert both.counts == whole.counts
    np.testing.assert_allclose(both.total_s, whole.total_s)


def test_totals_go_through_a_pipe_and_are_added_up() -> None:
    mine = Totals({"warm_starts": 2}, {"replicates": durations([0.5, 2.0])})
    again = msgspec.json.decode(msgspec.json.encode(mine), type=Totals)
    assert again == mine
    text = of_processes(mine + again + Totals({"spawn_starts": 1}), "somebody has")
    assert 'modelops_process_starts_total{isolation="warm"} 4' in text
    assert 'modelops_process_starts_total{isolation="spawn"} 1' in text
    assert "modelops_replicate_seconds_count 4" in text
    assert "modelops_environment_build_seconds_count 0" in text
    assert len(msgspec.json.encode(mine)) < 4096  # so that it is written to a pipe as one
