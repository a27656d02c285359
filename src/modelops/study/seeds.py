"""Seeds: a keyed bijection of the replicate number, so they never collide within a parameter set.

``seed(r) = fmix32(r XOR a) XOR b``, where ``fmix32`` is the finalizer of MurmurHash3 (32 bits; Austin
Appleby, public domain), a bijection of 32-bit integers, and ``a``, ``b`` are two 32-bit constants taken
from BLAKE2b (RFC 7693) over study seed and ``param_id``. Byte layout and test vectors:
``docs/reference/seeds.md``.
"""

from __future__ import annotations

from hashlib import blake2b
from struct import iter_unpack
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from modelops.study.ids import ParamId

MAX_STUDY_SEED = 2**63 - 1
MAX_EXPLICIT_SEED = 2**63 - 1
MAX_REPLICATES = 2**32
_SEED_PERSON = b"modelops.seed.1"
_ENTROPY_PERSON = b"modelops.entr.1"
_ID_BYTES = 16


class SeedKey(NamedTuple):
    """The two 32-bit constants of one parameter set."""

    a: int
    b: int


def seed_key(study_seed: int, param_id: ParamId | None) -> SeedKey:
    """Derive the constants of a parameter set; ``param_id`` None means common random numbers."""
    digest = blake2b(_key_material(study_seed, param_id), digest_size=8, person=_SEED_PERSON).digest()
    return SeedKey(int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))


def seed_keys(study_seed: int, param_ids: str) -> npt.NDArray[np.uint32]:
    """Return the constants of many parameter sets, whose ids stand one after another. Shape ``(n, 2)``."""
    return seed_keys_of(study_seed, bytes.fromhex(param_ids))


def seed_keys_of(study_seed: int, ids: bytes) -> npt.NDArray[np.uint32]:
    """Do the same with ids of 16 bytes each."""
    new_hash = blake2b(_key_material(study_seed, None), digest_size=8, person=_SEED_PERSON).copy
    digests = []
    update, digest = blake2b.update, blake2b.digest  # looked up once
    for (one,) in iter_unpack(f"{_ID_BYTES}s", ids):
        hashed = new_hash()  # two thirds of the price of making each anew
        update(hashed, one)
        digests.append(digest(hashed))
    return np.frombuffer(b"".join(digests), "<u4").astype(np.uint32, copy=False).reshape(-1, 2)


def entropy_key(study_seed: int, param_id: ParamId | None) -> bytes:
    """Return the 16-byte key from which ``context.entropy`` of each replicate is derived.

    The runner computes ``BLAKE2b(replicate as 8 bytes little-endian, key=entropy_key, digest_size=16)``
    and reads it as a little-endian integer, a 128-bit value for ``numpy.random.SeedSequence``.
    """
    return blake2b(_key_material(study_seed, param_id), digest_size=16, person=_ENTROPY_PERSON).digest()


def _key_material(study_seed: int, param_id: ParamId | None) -> bytes:
    if not 0 <= study_seed <= MAX_STUDY_SEED:
        raise ValueError(f"a study's seed must lie in 0..2**63-1, not {study_seed}")
    return study_seed.to_bytes(8, "little") + (bytes.fromhex(param_id) if param_id else b"")


def fmix32(h: int) -> int:
    """MurmurHash3's 32-bit finalizer, a bijection of ``0 <= h < 2**32``."""
    h ^= h >> 16
    h = h * 0x85EBCA6B & 0xFFFFFFFF
    h ^= h >> 13
    h = h * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16


def seed_of(key: SeedKey, replicate: int) -> int:
    """Return the 32-bit seed of one replicate (``0 <= replicate < 2**32``)."""
    return fmix32(replicate ^ key.a) ^ key.b


def seeds_of(key: SeedKey, first: int, n: int) -> npt.NDArray[np.int64]:
    """Return the seeds of the replicates ``first <= r < first + n``. Shape ``(n,)``, int64."""
    replicates = np.arange(first, first + n, dtype=np.int64)
    return seeds_at(np.uint32(key.a), np.uint32(key.b), replicates)


def seeds_at(
    a: npt.NDArray[np.uint32] | np.uint32,
    b: npt.NDArray[np.uint32] | np.uint32,
    replicates: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Return the seed of each replicate, whose parameter set has the constants ``a`` and ``b``; they broadcast."""
    h = replicates.astype(np.uint32) ^ a
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return (h ^ b).astype(np.int64)
