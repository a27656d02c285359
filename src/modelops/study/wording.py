"""Words for messages: what the user may have meant, and how many there are of something."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def counted(n: int, noun: str) -> str:
    """Return ``1 replicate``, ``2 replicates``."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def known_words(word: str, known: Sequence[str]) -> str:
    """Return `did_you_mean`, or else which words there are."""
    return did_you_mean(word, known) or f"; there are {', '.join(known)}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'model'?"`` when a known word is close to this one, otherwise nothing."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {str(close[0])!r}?" if close else ""
