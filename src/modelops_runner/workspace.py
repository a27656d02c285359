"""The working directory: the bundle's folders, with links to its files, as they were, for every replicate.

Folders are real and files are links to the snapshot, so relative reads work and new files are harmless
anywhere. What a replicate left behind is undone before the next one begins. Whether it left anything is
asked of inotify, one system call for all folders. Where there is none, modification times tell: they are
set to a moment that no write can set them to, because two writes within one tick of the kernel's clock
would otherwise leave the same time.
"""

from __future__ import annotations

import os
import sys

from modelops_runner.kept_files import KeptFiles, remove

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_ENTRIES = 2_000  # a bundle with more gets links to whole folders; the parent checks the snapshot anyway
_NEVER_NS = 1
_ATTRIB, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE, _DELETE_SELF, _MOVE_SELF = (
    0x4,
    0x40,
    0x80,
    0x100,
    0x200,
    0x400,
    0x800,
)
_CHANGES = 0x2 | _ATTRIB | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF | _MOVE_SELF
_NONBLOCK, _CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC


class Workspace:
    """The working directory and ``TMPDIR`` of this process.

    Parameters
    ----------
    workdir, tmpdir
        Empty folders of our own.
    snapshot
        The bundle.
    """

    def __init__(self, workdir: str, tmpdir: str, snapshot: str) -> None:
        self.workdir, self.tmpdir = workdir, tmpdir
        self._kept: KeptFiles | None = None
        self._adopted = False
        # path -> target of its link; None: a real folder; "": a file that an import left here
        self._tree = _mirror(snapshot, workdir)
        self._folders: list[str] = []
        self.inotify = _inotify()
        self.restore()

    def touched(self) -> bool:
        """Return whether anything changed since `restore`; for systems without inotify."""
        try:
            return any(os.stat(folder).st_mtime_ns != _NEVER_NS for folder in self._folders)
        except OSError:
            return True

    def adopt(self) -> None:
        """Keep what lies here now: importing the bundle made it, and its code may count on it."""
        for root in (self.workdir, self.tmpdir):
            for folder, folders, files in os.walk(root):
                for name in folders:
                    path = os.path.join(folder, name)
                    self._tree.setdefault(path, os.readlink(path) if os.path.islink(path) else None)
                for name in files:
                    self._tree.setdefault(os.path.join(folder, name), "")
        self._adopted = True
        self.restore()

    def keep(self, folder: str) -> None:
        """Let `restore` put back the content of files that an import left here, too; ``folder``: where copies may lie.

        For forks: what the bundle knows of its files is in each of them as it was after the import. Call it before one.
        """
        if self._adopted:
            self._adopted = False
            self._kept = self._kept or KeptFiles(folder)
            left = [path for path, target in self._tree.items() if target == ""]
            for path in left:
                if os.path.islink(path):
                    self._tree[path] = os.readlink(path)
            self._kept.take(left)

    def kept_changed(self) -> bool:
        """Return whether such a file has another content, also if that was written through mapped memory."""
        return self._kept is not None and self._kept.changed()

    def restore(self) -> None:
        """Make both folders what they were at the beginning, and go there."""
        for root in (self.workdir, self.tmpdir):
            if not os.path.isdir(root) or os.path.islink(root):
                remove(root)
                os.makedirs(root)
            os.chmod(root, 0o700)
        folders = [self.workdir, self.tmpdir]
        folders += [path for path, target in self._tree.items() if target is None]
        for path, target in self._tree.items():  # parents come first
            if target is None:
                if os.path.islink(path) or not os.path.isdir(path):
                    remove(path)
                    os.mkdir(path)
                os.chmod(
                    path, 0o700
                )  # at once: what lies in a folder without permissions cannot be looked at
            elif target and (not os.path.islink(path) or os.readlink(path) != target):
                remove(path)
                os.symlink(target, path)
        for folder in folders:
            for entry in os.listdir(folder):
                path = os.path.join(folder, entry)
                if path not in self._tree:
                    remove(path)
        if self._kept is not None:
            self._kept.put_back()
        os.chdir(self.workdir)
        self._watch(folders)

    def _watch(self, folders: list[str]) -> None:
        if self.inotify is None:
            for folder in folders:
                os.utime(folder, ns=(_NEVER_NS, _NEVER_NS))
        else:
            for folder in folders:
                if not self.inotify.watch(folder):  # the user's limit of watches
                    self.inotify.close()
                    self.inotify = None
                    self._watch(folders)
                    return
            self.inotify.forget()
        self._folders = folders


def _mirror(snapshot: str, workdir: str) -> dict[str, str | None]:
    tree: dict[str, str | None] = {}
    pending = [(snapshot, workdir)]
    while pending:  # breadth first: what lies near the top is mirrored even in a large bundle
        source, target = pending.pop(0)
        with os.scandir(source) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                path = os.path.join(target, entry.name)
                if entry.is_dir(follow_symlinks=False) and len(tree) < MAX_ENTRIES:
                    tree[path] = None
                    pending.append((entry.path, path))
                else:
                    tree[path] = entry.path
    return tree


class _Inotify:
    """The few calls of inotify(7) that are needed; ``fd`` becomes readable when a watched folder changes."""

    def __init__(self, libc: Any) -> None:
        self._libc = libc
        self.fd = libc.inotify_init1(_NONBLOCK | _CLOEXEC)
        if self.fd < 0:
            raise OSError("no inotify instance left for this user")

    def watch(self, folder: str) -> bool:
        return bool(self._libc.inotify_add_watch(self.fd, os.fsencode(folder), _CHANGES) >= 0)

    def forget(self) -> None:
        """Drop the events that `Workspace.restore` itself caused."""
        try:
            while os.read(self.fd, 65_536):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        os.close(self.fd)


def _inotify() -> _Inotify | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        import ctypes

        return _Inotify(ctypes.CDLL(None))
    except (ImportError, OSError, AttributeError):
        return None
