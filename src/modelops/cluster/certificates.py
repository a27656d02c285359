"""The certificates of a pool of several machines, as an operator keeps them: a folder for each role, one authority.

``authority/`` has the key that signs, and belongs on no machine of the pool. Each role's folder has all that its
machines need: ``ca.pem`` (whom to trust), ``cert.pem``, ``key.pem``, and ``dask.yaml``, which says the same in Dask's
own words. An authority is replaced in three steps, so that at each moment everybody trusts everybody: first all trust
the new one as well, then all get certificates of the new one, then the old one is forgotten.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509

from modelops.cluster.authority import Authority, Issued, general_name, issue, new_authority, read_authority
from modelops.cluster.run_folder import write_private
from modelops.errors import ConflictError, NotFoundError, RequestError, StorageError
from modelops.home import make_private
from modelops.settings import TLS_FILES

if TYPE_CHECKING:
    import datetime
    from collections.abc import Mapping, Sequence

AUTHORITY: Final = "authority"
OWN: Final = "authority.pem"  # certificate and key in one file, which is replaced as one
BEFORE: Final = "before.pem"
DASK_FILE: Final = "dask.yaml"
DAYS: Final = 365
_CA_FILE: Final = re.compile(r'ca-file: ("[^\n]*")')
LOCAL: Final = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class Role:
    """``dask``: what it is for Dask. ``listens``: others connect to it. ``named``: they look at its host name."""

    dask: str
    listens: bool = True
    named: bool = False


ROLES: Final[Mapping[str, Role]] = {
    "scheduler": Role("scheduler", named=True),
    "worker": Role("worker"),
    "server": Role("client", named=True),  # it drives jobs as a client of the scheduler, and answers HTTPS
    "client": Role("client", listens=False),
}


@dataclass(frozen=True)
class Kept:
    """A certificate of the folder. ``signed_by``: the serial number of its authority."""

    role: str
    serial: str
    hosts: tuple[str, ...]
    not_after: datetime.datetime
    signed_by: str


def create_certificates(
    folder: Path, hosts: Sequence[str], *, days: int = DAYS, at: Path | None = None
) -> None:
    """Make an authority and a certificate for each role, in a new folder or an empty one.

    Parameters
    ----------
    hosts
        Names and addresses of scheduler and server, besides those of this machine.
    at
        Where each role's folder will lie on its machines, for ``dask.yaml``; default: where it is made.

    Raises
    ------
    ConflictError
        There is something in the folder already.
    RequestError
        A host cannot be one.
    StorageError
        The folder cannot be written.
    """
    folder = folder.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConflictError(
            f"{folder} is not empty; 'modelops certs renew' makes new certificates of the authority in it"
        )
    authority, names = new_authority(), _hosts(hosts)
    try:
        make_private(folder)
        _write_authority(folder, authority, before=b"")
        for role in ROLES:
            _write_role(folder, role, _signed(authority, role, names, days), authority.certificate_pem(), at)
    except OSError as error:
        raise StorageError(f"the certificates cannot be written to {folder}: {error.strerror}") from error


def renew_certificates(
    folder: Path, hosts: Sequence[str] = (), *, days: int = DAYS, at: Path | None = None
) -> None:
    """Make new certificates of the newest authority for all roles.

    ``hosts``: besides those that stand in the present ones. Raises as `create_certificates`, and NotFoundError.
    """
    folder, authority = _opened(folder)
    for role in ROLES:
        names = dict.fromkeys((*_hosts(hosts), *(_hosts_of(_certificate(folder, role)))))
        issued = _signed(authority, role, list(names), days)
        _write_role(folder, role, issued, _trusted(folder, authority), at or _placed(folder, role))


def begin_authority(folder: Path) -> None:
    """Make a new authority, which all are to trust as well as the old one; certificates stay as they are."""
    folder, authority = _opened(folder)
    newer = new_authority()
    _write_authority(folder, newer, before=_trusted(folder, authority))
    for role in ROLES:
        write_private(folder / role / TLS_FILES[0], _trusted(folder, newer))


def forget_old_authorities(folder: Path) -> None:
    """Let only the newest authority be trusted.

    Raises
    ------
    ConflictError
        A certificate is still one of an older authority.
    """
    folder, authority = _opened(folder)
    newest = _serial(authority.certificate)
    old = [
        kept.role for kept in list_certificates(folder) if kept.role != AUTHORITY and kept.signed_by != newest
    ]
    if old:
        raise ConflictError(
            f"{' and '.join(old)} still have certificates of an older authority: 'modelops certs renew {folder}', "
            "bring the new ones to all machines, and then forget the old authority"
        )
    (folder / AUTHORITY / BEFORE).unlink(missing_ok=True)
    for role in ROLES:
        write_private(folder / role / TLS_FILES[0], authority.certificate_pem())


def list_certificates(folder: Path) -> list[Kept]:
    """Return all certificates of the folder: authorities, the newest first, and roles. Raises NotFoundError."""
    folder, authority = _opened(folder)
    authorities = x509.load_pem_x509_certificates(_trusted(folder, authority))
    by_key = {_key_id(a): _serial(a) for a in authorities}
    found = [(AUTHORITY, a) for a in authorities] + [(role, _certificate(folder, role)) for role in ROLES]
    return [
        Kept(role, _serial(c), tuple(_hosts_of(c)), c.not_valid_after_utc, by_key.get(_signer(c), "unknown"))
        for role, c in found
    ]


def _opened(folder: Path) -> tuple[Path, Authority]:
    folder = folder.expanduser().absolute()
    home = folder / AUTHORITY
    try:
        authority = read_authority((home / OWN).read_bytes())
    except OSError as error:
        raise NotFoundError(
            f"{folder} has no authority ({error.filename}: {error.strerror}); 'modelops certs create' makes one"
        ) from error
    except ValueError as error:
        raise RequestError(f"the authority in {home} cannot be used: {error}") from error
    return folder, authority


def _signed(authority: Authority, role: str, hosts: Sequence[str], days: int) -> Issued:
    kind = ROLES[role]
    return issue(authority, f"ModelOps {role}", hosts if kind.named else (), days, listens=kind.listens)


def _hosts(hosts: Sequence[str]) -> list[str]:
    try:
        for host in hosts:
            general_name(host)
    except ValueError as error:
        raise RequestError(str(error)) from error
    return list(dict.fromkeys((*hosts, *LOCAL)))


def _write_authority(folder: Path, authority: Authority, *, before: bytes) -> None:
    home = folder / AUTHORITY
    make_private(home)
    if before:
        write_private(home / BEFORE, before)
    write_private(home / OWN, authority.pem())


def _write_role(folder: Path, role: str, issued: Issued, trusted: bytes, at: Path | None) -> None:
    """Replace the folder of a role by a new one that is whole."""
    target = folder / role
    new = Path(tempfile.mkdtemp(prefix=f".{role}-", dir=folder))  # mode 0700
    try:
        contents = (trusted, issued.certificate, issued.key)
        for name, content in zip(TLS_FILES, contents, strict=True):
            write_private(new / name, content)
        write_private(new / DASK_FILE, _dask_yaml(role, at or target).encode())
        if target.exists():
            shutil.rmtree(target)
        new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _dask_yaml(role: str, at: Path) -> str:
    ca, cert, key = (json.dumps(str(at / name)) for name in TLS_FILES)  # a JSON string is one of YAML, too
    return (
        "distributed:\n  comm:\n    require-encryption: true\n    tls:\n"
        f"      ca-file: {ca}\n      {ROLES[role].dask}:\n        cert: {cert}\n        key: {key}\n"
    )


def _trusted(folder: Path, authority: Authority) -> bytes:
    """Return the certificates of all authorities, the newest first."""
    newest = authority.certificate_pem()
    return newest + _before(folder).replace(
        newest, b""
    )  # it is there, too, after a step that was interrupted


def _placed(folder: Path, role: str) -> Path | None:
    """Return where the folder of a role lies on its machines, as it was said before."""
    path = folder / role / DASK_FILE
    if not path.exists():
        return None
    said = _CA_FILE.search(path.read_text())
    return Path(json.loads(said[1])).parent if said else None  # a person has written it anew


def _before(folder: Path) -> bytes:
    path = folder / AUTHORITY / BEFORE
    return path.read_bytes() if path.exists() else b""


def _certificate(folder: Path, role: str) -> x509.Certificate:
    path = folder / role / "cert.pem"
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RequestError(f"{path} is no certificate: {error}") from error


def _hosts_of(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]


def _serial(certificate: x509.Certificate) -> str:
    return f"{certificate.serial_number:x}"


def _key_id(authority: x509.Certificate) -> bytes:
    return authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest


def _signer(certificate: x509.Certificate) -> bytes:
    return (
        certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        or b""
    )
