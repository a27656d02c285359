"""Ids: UUIDv7 as RFC 9562 lays it out, and attempts that can be played again."""

from __future__ import annotations

import re

from doc_tables import rows_below
from hypothesis import given
from hypothesis import strategies as st

from modelops.study.ids import attempt_id, new_job_id, uuid7

times = st.integers(0, 2**48 - 1)
entropies = st.binary(min_size=10, max_size=10)


@given(times, entropies)
def test_a_uuid7_has_its_version_variant_and_time(unix_ms: int, entropy: bytes) -> None:
    made = uuid7(unix_ms, entropy)
    assert made.version == 7
    assert made.variant == "specified in RFC 4122"
    assert made.int >> 80 == unix_ms


@given(times, times, entropies, entropies)
def test_ids_sort_by_time(early: int, late: int, a: bytes, b: bytes) -> None:
    early, late = sorted((early, late))
    if early < late:
        assert uuid7(early, a).hex < uuid7(late, b).hex


def test_job_ids_differ_and_say_what_they_are() -> None:
    ids = {new_job_id() for _ in range(1_000)}
    assert len(ids) == 1_000
    assert all(re.fullmatch(r"job_[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}", name) for name in ids)


def test_attempt_ids_are_epoch_and_number() -> None:
    assert attempt_id(1, 17) == "0001-000017"
    assert attempt_id(12345, 1234567) == "12345-1234567"


def test_the_vectors_of_the_reference_page_hold() -> None:
    for unix_ms, a, b, expected in rows_below("ids.md", "| milliseconds |"):
        entropy = (int(a, 16) << 68 | int(b, 16)).to_bytes(10, "big")
        assert uuid7(int(unix_ms), entropy).hex == expected
