"""Make root obey file modes, so that "read-only" means the same for every user.

The snapshot of a bundle is read-only by its modes alone, and root ignores modes: a model that opens a file of
its bundle for writing would change what the next replicates read. One capability is that privilege. It
is given up for good (taken from the bounding set, so that no program the model starts gets it back) before
anything of the bundle is imported.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_DAC_OVERRIDE = 1 << 1  # linux/capability.h
_PR_CAPBSET_DROP = 24
_VERSION_3 = 0x20080522


def obey_modes(readable: Iterable[str], writable: Iterable[str]) -> bool:
    """Give up root's right to ignore modes; return whether this process obeys them now.

    It is kept where the process needs it for its own folders: in a container, root may work in folders of
    another user. Must be called while there is one thread, since capabilities belong to threads.
    """
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return os.geteuid() != 0
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
        # Two triples (effective, permitted, inheritable); the capability in question is in the first one.
        sets = (ctypes.c_uint32 * 6)()
        if libc.capget(header, sets) != 0:
            return False
        before = list(sets)
        if not (before[0] | before[1]) & _DAC_OVERRIDE:
            return True
        sets[0] &= ~_DAC_OVERRIDE
        sets[2] &= ~_DAC_OVERRIDE
        if libc.capset(header, sets) != 0:
            return False
        reached = all(os.access(path, os.R_OK | os.X_OK, effective_ids=True) for path in readable) and all(
            os.access(path, os.R_OK | os.W_OK | os.X_OK, effective_ids=True) for path in writable
        )
        if not reached or libc.prctl(_PR_CAPBSET_DROP, 1, 0, 0, 0) != 0:
            sets[:] = before
            libc.capset(header, sets)
            return False
        sets[1] &= ~_DAC_OVERRIDE
        return bool(libc.capset(header, sets) == 0)
    except (ImportError, OSError, AttributeError):
        return False  # a libc without these calls: the parent still looks at the snapshot after the job
