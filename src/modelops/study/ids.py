"""Identifiers. Jobs: a UUIDv7 (RFC 9562) behind a prefix. Attempts: epoch and number within their job.

Reference: ``docs/reference/ids.md``.
"""

from __future__ import annotations

import os
import time
import uuid
from typing import NewType

JobId = NewType("JobId", str)
AttemptId = NewType("AttemptId", str)
BundleDigest = NewType("BundleDigest", str)
EnvironmentKey = NewType("EnvironmentKey", str)
ParamId = NewType("ParamId", str)


def uuid7(unix_ms: int, entropy: bytes) -> uuid.UUID:
    """Return a UUIDv7: 48 bits of Unix milliseconds, then version, variant and 74 random bits.

    Parameters
    ----------
    unix_ms
        Milliseconds since the epoch, below 2**48.
    entropy
        At least 10 random bytes.
    """
    rand = int.from_bytes(entropy[:10], "big")
    value = (unix_ms & (2**48 - 1)) << 80
    value |= 0x7 << 76 | (rand >> 68 & 0xFFF) << 64
    value |= 0b10 << 62 | (rand & (2**62 - 1))
    return uuid.UUID(int=value)


def _fresh(prefix: str) -> str:
    return f"{prefix}_{uuid7(time.time_ns() // 1_000_000, os.urandom(10)).hex}"


def attempt_id(epoch: int, n: int) -> AttemptId:
    """Return the id of the ``n``-th attempt that the driver with this epoch makes; unique within its job."""
    return AttemptId(f"{str(epoch).zfill(4)}-{str(n).zfill(6)}")  # half the time of :04d and :06d


def part_id(attempt: AttemptId) -> AttemptId:
    """Return the id under which an attempt hands in what it has finished while one of its replicates goes on."""
    return AttemptId(f"{attempt}p")


def epoch_of(attempt: AttemptId) -> int:
    """Return the epoch of the driver that made an attempt; 0 if that is no id of an attempt."""
    head, _, _ = attempt.partition("-")
    return int(head) if head.isascii() and head.isdigit() else 0


def new_token_id() -> str:
    """Return an id for a token that no other one has; ids sort by the time they were made."""
    return _fresh("tok")


def new_job_id() -> JobId:
    """Return an id that no other job has; ids sort by the time they were made."""
    return JobId(_fresh("job"))
