"""Object storage behind a URL, through obstore: S3, Azure Blob, GCS (and ``memory://`` for tests)."""

# ruff: noqa: D102  what the methods do is said once, in Objects

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import obstore
from obstore.exceptions import AlreadyExistsError as ObstoreAlreadyExistsError
from obstore.exceptions import BaseError
from obstore.exceptions import NotFoundError as ObstoreNotFoundError
from obstore.store import from_url

from modelops.errors import NotFoundError, StorageError
from modelops.store.objects import (
    COPY_BYTES,
    AlreadyExistsError,
    Content,
    Objects,
    checked_length,
    checked_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obstore.store import ObjectStore, RetryConfig

# Whoever calls us waits and tries again, and says so. By itself obstore would do that for minutes, in silence.
_RETRY: Final[RetryConfig] = {"max_retries": 2, "retry_timeout": timedelta(seconds=5)}


class RemoteObjects(Objects):
    """Objects in a store that obstore can reach."""

    def __init__(self, store: ObjectStore, where: str) -> None:
        self.store = store
        self.where = where

    @classmethod
    def from_url(cls, url: str) -> RemoteObjects:
        """Connect lazily; credentials come from the environment as each cloud's own tools read them."""
        with _as_ours("opening", "", url):
            return cls(from_url(url, retry_config=_RETRY), url)

    def __repr__(self) -> str:
        return f"RemoteObjects({self.where!r})"

    def put_new(self, name: str, content: Content) -> None:
        # A conditional create is one request: obstore does not split it into parts.
        with _as_ours("storing", name, self.where):
            obstore.put(self.store, checked_name(name), _source(content), mode="create", use_multipart=False)

    def put(self, name: str, content: Content) -> None:
        with _as_ours("storing", name, self.where):
            obstore.put(self.store, checked_name(name), _source(content))

    def get(self, name: str) -> bytes:
        with _as_ours("reading", name, self.where):
            return bytes(obstore.get(self.store, checked_name(name)).bytes())

    def read(self, name: str, offset: int, length: int) -> bytes:
        if length == 0:  # services refuse an empty range
            return b""
        with _as_ours("reading", name, self.where):
            data = bytes(obstore.get_range(self.store, checked_name(name), start=offset, length=length))
        return checked_length(data, name, offset, length)

    def stream(self, name: str) -> Iterator[bytes]:
        with _as_ours("reading", name, self.where):
            for piece in obstore.get(self.store, checked_name(name)).stream(min_chunk_size=COPY_BYTES):
                yield bytes(piece)

    def size(self, name: str) -> int:
        with _as_ours("reading", name, self.where):
            return int(obstore.head(self.store, checked_name(name))["size"])

    def exists(self, name: str) -> bool:
        try:
            with _as_ours("looking for", name, self.where):
                obstore.head(self.store, checked_name(name))
        except NotFoundError:
            return False
        return True

    def list(self, prefix: str) -> Iterator[str]:
        with _as_ours("listing", prefix, self.where):
            below = checked_name(prefix) + "/" if prefix else None
            return iter(sorted(m["path"] for page in obstore.list(self.store, prefix=below) for m in page))

    def sizes(self, prefix: str) -> dict[str, int]:
        with _as_ours("listing", prefix, self.where):
            below = checked_name(prefix) + "/" if prefix else None
            return {m["path"]: m["size"] for page in obstore.list(self.store, prefix=below) for m in page}

    def delete(self, name: str) -> None:
        try:
            with _as_ours("deleting", name, self.where):
                obstore.delete(self.store, checked_name(name))
        except NotFoundError:
            return


@contextmanager
def _as_ours(doing: str, name: str, where: str) -> Iterator[None]:
    try:
        yield
    except (ObstoreNotFoundError, FileNotFoundError) as e:  # obstore raises the latter
        raise NotFoundError(f"there is no object {name} in {where}") from e
    except ObstoreAlreadyExistsError as e:
        raise AlreadyExistsError(f"{name} exists in {where}") from e
    except (BaseError, OSError) as e:
        raise StorageError(
            f"{doing} {name} in {where} failed: {_first_lines(e)}; see whether that service is up and lets this "
            "machine in (address and credentials come from the environment, e.g. AWS_ENDPOINT_URL)"
        ) from e


def _first_lines(error: Exception) -> str:
    """Return what obstore says, on one line, without the Rust value that it appends."""
    return " ".join(str(error).partition("Debug source")[0].split())


def _source(content: Content) -> bytes | Path | Iterator[bytes] | IO[bytes]:
    return content if isinstance(content, bytes | Path) else iter(content)
