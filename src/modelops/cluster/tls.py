"""Certificates of a pool: one authority, one certificate that it signed for all processes, and no key of the authority.

Scheduler, workers and clients each show the certificate and ask for one of the same authority, so whoever has
not got the three files gets in nowhere. The authority's own key is thrown away: nothing can be added later.
(Operators of several machines keep theirs, see `modelops.cluster.certificates`.)

Where the files are is said by a folder, or else by Dask's own configuration (``distributed.comm.tls``). A folder has
them under our names, or under those that Kubernetes gives them in a Secret of type ``kubernetes.io/tls``.
"""

from __future__ import annotations

import datetime
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from modelops.cluster.run_folder import write_private
from modelops.errors import ClusterError
from modelops.settings import TLS_FILES, tls_files

if TYPE_CHECKING:
    from distributed.security import Security

VALID_DAYS: Final = 3650
RENEW_DAYS: Final = 30
Part = Literal["scheduler", "worker", "client"]


def ensure_certificates(folder: Path) -> None:
    """Make the three files unless they are there and good for a while; all of them appear at once.

    To be called by one process at a time.
    """
    if is_good(folder):
        return
    parent = folder.parent
    new = Path(tempfile.mkdtemp(prefix=".tls-", dir=parent))  # mode 0700
    try:
        make_certificates(new)
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def is_good(folder: Path, days: int = RENEW_DAYS) -> bool:
    """Whether the three files are there, belong together, and are valid now and for so many days more."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    from modelops.cluster.authority import is_signed_by

    try:
        ca, cert = (x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in TLS_FILES[:2])
        key = load_pem_private_key((folder / "key.pem").read_bytes(), None)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return False
    now = datetime.datetime.now(datetime.UTC)
    # Made while the clock was ahead, they would be good for nothing until then.
    begun = max(ca.not_valid_before_utc, cert.not_valid_before_utc) <= now
    lasts = min(ca.not_valid_after_utc, cert.not_valid_after_utc) > now + datetime.timedelta(days=days)
    private = all((folder / name).stat().st_mode & 0o077 == 0 for name in TLS_FILES)
    belong = is_signed_by(cert, ca) and key.public_key() == cert.public_key()
    return private and belong and begun and lasts


def make_certificates(folder: Path) -> None:
    """Write ``ca.pem``, ``cert.pem`` and ``key.pem``, each for its user only."""
    from modelops.cluster.authority import issue, new_authority

    authority = new_authority(VALID_DAYS)
    issued = issue(authority, "ModelOps pool", ["localhost"], VALID_DAYS)
    for name, content in zip(
        TLS_FILES, (authority.certificate_pem(), issued.certificate, issued.key), strict=True
    ):
        write_private(folder / name, content)


def security(folder: Path | None, part: Part) -> Security:
    """Return what Dask needs to show its certificate and to ask for one.

    Parameters
    ----------
    folder
        Where the files are; None: where Dask's configuration says.
    part
        What this process is for Dask.

    Raises
    ------
    ClusterError
        A file is missing or cannot be read.
    """
    from distributed.security import Security

    if folder is None:
        made = Security(require_encryption=True)
        said = [
            ("distributed.comm.tls.ca-file", getattr(made, "tls_ca_file")),  # noqa: B009  mypy sees __slots__ only
            (f"distributed.comm.tls.{part}.cert", getattr(made, f"tls_{part}_cert")),
        ]
        if (
            key := getattr(made, f"tls_{part}_key")
        ) is not None:  # else it stands in the file of the certificate
            said.append((f"distributed.comm.tls.{part}.key", key))
        for name, path in said:
            if path is None or not os.access(path, os.R_OK):
                raise ClusterError(
                    f"Dask's configuration says in {name}: {path}, which cannot be read; name a file, or set "
                    "MODELOPS_TLS to a folder"
                )
        return made
    ca, cert, key = (str(path) for path in tls_files(folder))
    for path in (ca, cert, key):
        if not os.access(path, os.R_OK):
            raise ClusterError(
                f"the certificates of the pool cannot be read: {path}; MODELOPS_TLS names the folder that holds "
                f"{', '.join(TLS_FILES)}"
            )
    return Security(
        require_encryption=True,
        tls_ca_file=ca,
        **{f"tls_{who}_{what}": path for who in ("scheduler", "worker", "client")
           for what, path in (("cert", cert), ("key", key))},
    )  # fmt: skip


def dask_names_certificates() -> bool:
    """Say whether Dask's own configuration names an authority, so that ours is not wanted."""
    import dask

    return bool(dask.config.get("distributed.comm.tls.ca-file", None))
