"""Words for messages: what the user may have meant, and how many there are of something."""

from __future__ import annotations

import re
import unicodedata
from difflib import get_close_matches
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def spelt_out(text: str) -> str:
    r"""Spell out what no column can hold: NUL (as ``\x00``), and what is not UTF-8 (``\xe9``, ``\ud800``).

    PostgreSQL's text has no NUL, and no database has lone surrogates, which is how Python holds bytes of names that
    are not UTF-8. Exceptions of models, names of files and requests bring them, so each text that is written or looked
    for is made so, and is the same on every database.
    """
    if "\0" in text:
        text = text.replace("\0", r"\x00")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATE.sub(_escape, text)
    return text


def shown_path(path: object, longest: int = 900) -> str:
    """Return a path as one line of text, whatever bytes its names have; of a very long one, the end."""
    text = _CONTROL.sub(_escape, spelt_out(str(path)))
    return text if len(text) <= longest else f"...{text[-longest:]}"


def shown_name(text: str) -> str:
    """Return a name as one line of text that stays in its place: what moves the cursor or turns text is spelt out."""
    if text.isprintable():
        return text
    return "".join(_spelt(c) if unicodedata.category(c) in _UNSEEN else c for c in spelt_out(text))


def shown_text(text: str) -> str:
    """Return text of several lines likewise, for a terminal: tabs and ends of lines stay."""
    if text.isprintable():
        return text
    return "\n".join("\t".join(map(shown_name, line.split("\t"))) for line in text.split("\n"))


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


_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_UNSEEN: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # as U+202E, which turns what follows around
_FIRST_BYTE, _LAST_BYTE = 0xDC80, 0xDCFF  # how ``surrogateescape`` holds the bytes from 0x80 on


def _spelt(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\x{code - 0xDC00:02x}" if _FIRST_BYTE <= code <= _LAST_BYTE else f"\\u{code:04x}"
