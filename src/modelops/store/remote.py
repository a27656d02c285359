"""Object storage behind a URL, through obstore: S3, Azure Blob, GCS (and ``memory://`` for tests)."""

# ruff: noqa: D102  what the methods do is said once, in Objects

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import obstore
from obstore.exceptions import AlreadyExistsError as ObstoreAlreadyExistsError
from obstore.exceptions import BaseError
from obstore.exceptions import NotFoundError as ObstoreNotFoundError
from obstore.store import from_url

from modelops.counters import Counted, count
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

    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

# Whoever calls us waits and tries again, and says so. By itself obstore would do that for minutes, in silence.
_RETRY: Final[RetryConfig] = {"max_retries": 2, "retry_timeout": timedelta(seconds=5)}

# A service that says nothing for QUIET_S does not do its part. What is sent gets the time it takes at SLOWEST beside
# that: the limit holds from the first byte out to the first one back. What is read is limited piece by piece only.
QUIET_S: Final = 30.0
SLOWEST_BYTES_PER_S: Final = 64 * 1024
LONGEST_READ: Final = timedelta(days=7)
AT_ONCE_BYTES: Final = 1 << 20
PART_BYTES: Final = 8 << 20
PARTS_AT_ONCE: Final = 4
# Told some options, obstore no longer looks for the others in the environment.
_CLIENT_OPTIONS: Final = (
    "allow_http", "allow_invalid_certificates", "connect_timeout", "http1_only", "http2_only", "pool_idle_timeout",
    "pool_max_idle_per_host", "proxy_ca_certificate", "proxy_excludes", "proxy_url", "read_timeout", "timeout",
    "user_agent",
)  # fmt: skip
_NO_BUCKET: Final = ("NoSuchBucket", "ContainerNotFound")  # S3 and GCS; Azure
_VARIABLES: Final = {
    "s3": "AWS", "s3a": "AWS", "az": "AZURE", "adl": "AZURE", "azure": "AZURE", "abfs": "AZURE", "abfss": "AZURE",
    "gs": "GOOGLE",
}  # fmt: skip


class RemoteObjects(Objects):
    """Objects in a store that obstore can reach."""

    def __init__(self, url: str) -> None:
        self.where = url
        self.store = self._opened({"timeout": LONGEST_READ, "read_timeout": timedelta(seconds=QUIET_S)})
        self._to_send: dict[int, ObjectStore] = {}

    @classmethod
    def from_url(cls, url: str) -> RemoteObjects:
        """Connect lazily; credentials come from the environment as each cloud's own tools read them."""
        return cls(url)

    def __repr__(self) -> str:
        return f"RemoteObjects({self.where!r})"

    @property
    def place(self) -> str:
        endpoint = os.environ.get(f"{_VARIABLES.get(self.where.partition('://')[0], '')}_ENDPOINT_URL", "")
        return self.where + (f" at {endpoint}" if endpoint else "")

    def put_new(self, name: str, content: Content) -> None:
        # A conditional create is one request: obstore does not split it into parts.
        if not isinstance(content, bytes | Path):
            content = b"".join(content)
        with _as_ours("storing", name, self.where):
            n_bytes = content.stat().st_size if isinstance(content, Path) else len(content)
            store = self._sending(n_bytes)
            obstore.put(store, checked_name(name), content, mode="create", use_multipart=False)

    def put(self, name: str, content: Content) -> None:
        n_bytes = len(content) if isinstance(content, bytes) else PART_BYTES * PARTS_AT_ONCE
        with _as_ours("storing", name, self.where):
            obstore.put(
                self._sending(n_bytes), checked_name(name), _source(content),
                chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE,
            )  # fmt: skip

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
            return int(self._head(checked_name(name))["size"])

    def exists(self, name: str) -> bool:
        try:
            with _as_ours("looking for", name, self.where):
                self._head(checked_name(name))
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

    def _head(self, name: str) -> ObjectMeta:
        try:
            return obstore.head(self.store, name)
        except FileNotFoundError:
            # It was said without a word. Is it the object that is missing, or the whole bucket?
            return obstore.get(self.store, name).meta

    def _sending(self, n_bytes: int) -> ObjectStore:
        """Return the store whose requests may take as long as so many bytes do."""
        if n_bytes <= AT_ONCE_BYTES or self.where.startswith(
            "memory:"
        ):  # a second one would hold other objects
            return self.store
        size = 1 << (n_bytes - 1).bit_length()  # few sizes: each has connections of its own
        if size not in self._to_send:
            limit = timedelta(seconds=QUIET_S + size / SLOWEST_BYTES_PER_S)
            self._to_send[size] = self._opened({"timeout": limit})
        return self._to_send[size]

    def _opened(self, limits: ClientConfig) -> ObjectStore:
        with _as_ours("opening", "", self.where):
            options: Any = {**limits, **_client_options(self.where)}
            return from_url(self.where, retry_config=_RETRY, client_options=options)


def _client_options(url: str) -> dict[str, str]:
    """Return what the environment says of connections, by the names that obstore gives to it."""
    variables = _VARIABLES.get(url.partition("://")[0])
    if variables is None:
        return {}
    found = {name: os.environ.get(f"{variables}_{name.upper()}", "") for name in _CLIENT_OPTIONS}
    return {name: value for name, value in found.items() if value}


@contextmanager
def _as_ours(doing: str, name: str, where: str) -> Iterator[None]:
    try:
        yield
    except (ObstoreNotFoundError, FileNotFoundError) as e:  # obstore raises the latter
        if not any(code in str(e) for code in _NO_BUCKET):
            raise NotFoundError(f"there is no object {name} in {where}") from e
        # Nothing is known of any object then: none is gone, and what is stored comes back with the bucket.
        count(Counted.STORAGE_ERRORS)
        raise StorageError(
            f"{doing} {name} in {where} failed: the service says that there is no such bucket or container; see "
            "whether it was removed or renamed, and whether that is the right service"
        ) from e
    except ObstoreAlreadyExistsError as e:
        raise AlreadyExistsError(f"{name} exists in {where}") from e
    except (BaseError, OSError) as e:
        count(Counted.STORAGE_ERRORS)
        raise StorageError(
            f"{doing} {name} in {where} failed: {_first_lines(e)}; see whether that service is up and lets this "
            "machine in (address and credentials come from the environment, e.g. AWS_ENDPOINT_URL)"
        ) from e


def _first_lines(error: Exception) -> str:
    """Return what obstore says, on one line, without the Rust value that it appends."""
    return " ".join(str(error).partition("Debug source")[0].split())


def _source(content: Content) -> bytes | Path | Iterator[bytes] | IO[bytes]:
    return content if isinstance(content, bytes | Path) else iter(content)
