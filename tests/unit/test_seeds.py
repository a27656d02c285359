"""Seeds: a bijection of the replicate number, checked against a second implementation of the page's text."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pytest
from doc_tables import rows_below
from hypothesis import given
from hypothesis import strategies as st

from modelops.study.ids import ParamId
from modelops.study.seeds import MAX_STUDY_SEED, SeedKey, entropy_key, fmix32, seed_key, seed_of, seeds_of

study_seeds = st.integers(0, MAX_STUDY_SEED)
param_ids = st.none() | st.binary(min_size=16, max_size=16).map(lambda b: ParamId(b.hex()))
replicates = st.integers(0, 2**32 - 1)
INVERSE_1: int = pow(0x85EBCA6B, -1, 2**32)
INVERSE_2: int = pow(0xC2B2AE35, -1, 2**32)


def seed_by_the_page(study_seed: int, param_id: str | None, replicate: int) -> int:
    """Follow docs/reference/seeds.md, with division and remainder in place of shifts and masks."""
    material = b"".join((study_seed // (1 << 8 * i) % 256).to_bytes(1, "big") for i in range(8))
    if param_id is not None:
        material += bytes(int(param_id[i : i + 2], 16) for i in range(0, 32, 2))
    digest = blake2b(material, digest_size=8, person=b"modelops.seed.1\0").digest()
    a = sum(byte * (1 << 8 * i) for i, byte in enumerate(digest[:4]))
    b = sum(byte * (1 << 8 * i) for i, byte in enumerate(digest[4:]))
    h: int = replicate ^ a
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = (h ^ h // (1 << shift)) * factor % 2**32
    return h ^ b


def unmix32(h: int) -> int:
    """Undo fmix32, step by step."""
    h ^= h >> 16
    h = h * INVERSE_2 % 2**32
    h ^= h >> 13 ^ h >> 26
    h = h * INVERSE_1 % 2**32
    return h ^ h >> 16


@given(study_seeds, param_ids, replicates)
def test_a_second_implementation_from_the_page_agrees(
    study_seed: int, param_id: ParamId | None, r: int
) -> None:
    assert seed_of(seed_key(study_seed, param_id), r) == seed_by_the_page(study_seed, param_id, r)


@given(replicates)
def test_the_finalizer_can_be_undone(h: int) -> None:
    assert 0 <= fmix32(h) < 2**32
    assert unmix32(fmix32(h)) == h


@given(study_seeds, param_ids, replicates)
def test_the_replicate_can_be_found_from_its_seed(study_seed: int, param_id: ParamId | None, r: int) -> None:
    key = seed_key(study_seed, param_id)
    assert unmix32(seed_of(key, r) ^ key.b) ^ key.a == r


@given(st.integers(0, 2**32 - 300), st.integers(0, 300), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_many_seeds_at_once_are_those_of_one_at_a_time(first: int, n: int, a: int, b: int) -> None:
    key = SeedKey(a, b)
    many = seeds_of(key, first, n)
    assert many.dtype == np.int64
    assert many.tolist() == [seed_of(key, r) for r in range(first, first + n)]


def test_a_million_seeds_are_distinct_and_fit_32_bits() -> None:
    seeds = seeds_of(seed_key(7, None), 0, 1_000_000)
    assert len(np.unique(seeds)) == 1_000_000
    assert 0 <= seeds.min() <= seeds.max() < 2**32


@pytest.mark.parametrize("outside", [-1, MAX_STUDY_SEED + 1])
def test_a_study_seed_outside_its_bounds_is_refused(outside: int) -> None:
    with pytest.raises(ValueError, match="study's seed"):
        seed_key(outside, None)


def test_the_vectors_of_the_reference_page_hold() -> None:
    for study_seed, param_id, a, b, seeds, entropy, first in rows_below("seeds.md", "| study seed |"):
        of = None if param_id == "none" else ParamId(param_id)
        key = seed_key(int(study_seed), of)
        assert (f"{key.a:08x}", f"{key.b:08x}") == (a, b)
        expected = [int(s) for s in seeds.split(", ")]
        assert [seed_of(key, r) for r in (0, 1, 2, 4294967295)] == expected
        assert [seed_by_the_page(int(study_seed), of, r) for r in (0, 1, 2, 4294967295)] == expected
        assert entropy_key(int(study_seed), of).hex() == entropy
        digest = blake2b((0).to_bytes(8, "little"), key=bytes.fromhex(entropy), digest_size=16).digest()
        assert int.from_bytes(digest, "little") == int(first)
