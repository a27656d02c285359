"""Certificates of a pool: one authority, one certificate that it signed for all processes, and no key of the authority.

Scheduler, workers and clients each show the certificate and ask for one of the same authority, so whoever has
not got the three files gets in nowhere. The authority's own key is thrown away: nothing can be added later.
"""

from __future__ import annotations

import datetime
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from modelops.cluster.run_folder import write_private
from modelops.errors import ClusterError

if TYPE_CHECKING:
    from cryptography import x509
    from distributed.security import Security

FILES: Final = ("ca.pem", "cert.pem", "key.pem")
VALID_DAYS: Final = 3650
RENEW_DAYS: Final = 30


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
    """Whether the three files are there, belong together and are valid for so many days more."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        ca, cert = (x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in FILES[:2])
        key = load_pem_private_key((folder / "key.pem").read_bytes(), None)
        cert.verify_directly_issued_by(ca)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, InvalidSignature):
        return False
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    private = all((folder / name).stat().st_mode & 0o077 == 0 for name in FILES)
    same_key = key.public_key() == cert.public_key()
    return private and same_key and min(ca.not_valid_after_utc, cert.not_valid_after_utc) > until


def make_certificates(folder: Path) -> None:
    """Write ``ca.pem``, ``cert.pem`` and ``key.pem``, each for its user only."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID as Usage
    from cryptography.x509.oid import NameOID

    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    now = datetime.datetime.now(datetime.UTC)

    def begun(common_name: str, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ModelOps pool authority")]))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))  # for a clock that is a little behind
            .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
        )

    authority = (
        begun("ModelOps pool authority", authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    certificate = (
        begun("ModelOps pool", key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([Usage.SERVER_AUTH, Usage.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    write_private(folder / "ca.pem", authority.public_bytes(Encoding.PEM))
    write_private(folder / "cert.pem", certificate.public_bytes(Encoding.PEM))
    write_private(folder / "key.pem", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def security(folder: Path) -> Security:
    """Return what Dask needs to show the certificate and to ask for one.

    Raises
    ------
    ClusterError
        A file is missing or cannot be read.
    """
    from distributed.security import Security

    ca, cert, key = (str(folder / name) for name in FILES)
    for path in (ca, cert, key):
        if not os.access(path, os.R_OK):
            raise ClusterError(
                f"the certificates of the pool cannot be read: {path}; MODELOPS_TLS names the folder that holds "
                f"{', '.join(FILES)}"
            )
    return Security(
        require_encryption=True,
        tls_ca_file=ca,
        **{f"tls_{who}_{what}": path for who in ("scheduler", "worker", "client")
           for what, path in (("cert", cert), ("key", key))},
    )  # fmt: skip


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip
