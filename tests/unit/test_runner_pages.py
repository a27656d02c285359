"""A process that is forked often asks for huge pages in time, and does without where there are none."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from typing import TYPE_CHECKING

import pytest

from modelops_runner import pages

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_memory_is_moved_after_some_forks_and_again_after_many(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    monkeypatch.setattr(pages, "_MAPS", __file__)
    memory = pages.Pages()
    for fork in range(pages.FIRST_AFTER + 2 * pages.AGAIN_AFTER + 2):

        def collapse(fork: int = fork) -> int:
            moved.append(fork)
            return 3

        monkeypatch.setattr(pages, "collapse", collapse)
        memory.before_fork()
    first, again = pages.FIRST_AFTER, pages.AGAIN_AFTER
    assert moved == [first, first + again, first + 2 * again]
    assert gc.get_freeze_count() > 0


@pytest.mark.parametrize("has_maps", [True, False])
def test_who_cannot_have_huge_pages_does_not_ask_again(
    monkeypatch: pytest.MonkeyPatch, has_maps: bool
) -> None:
    asked: list[int] = []

    def collapse() -> int:
        asked.append(1)
        return 0

    monkeypatch.setattr(pages, "_MAPS", __file__ if has_maps else "/no/such/file")
    monkeypatch.setattr(pages, "collapse", collapse)
    memory = pages.Pages()
    for _ in range(pages.FIRST_AFTER + 2 * pages.AGAIN_AFTER):
        memory.before_fork()
    assert len(asked) == has_maps


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what memory a process has")
def test_only_memory_that_is_in_use_is_moved_and_keeps_what_is_in_it() -> None:
    libc, page = ctypes.CDLL(None), mmap.PAGESIZE
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def apart(n_bytes: int) -> tuple[mmap.mmap, int]:
        """Return memory that the kernel does not take for one with what lies beside it, and where it begins."""
        memory = mmap.mmap(-1, n_bytes + 2 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        lo = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for at in (lo, lo + page + n_bytes):
            assert libc.mprotect(at, page, mmap.PROT_READ) == 0
        return memory, lo + page

    n_bytes = 3 * pages.HUGE_BYTES
    used, lo = apart(n_bytes)
    _unused, elsewhere = apart(n_bytes)
    content = bytes(range(256)) * (n_bytes // 256)
    used[page:-page] = content
    found = list(pages._full())
    assert (lo, lo + n_bytes) in found
    assert not any(a <= elsewhere < b for a, b in found)
    assert pages.collapse() >= 0  # how many is the kernel's affair
    assert used[page:-page] == content
