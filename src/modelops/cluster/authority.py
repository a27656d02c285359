"""A private authority, and certificates that it signs. Values in, values out: nothing is written here."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from collections.abc import Sequence

AUTHORITY_NAME: Final = "ModelOps pool authority"
AUTHORITY_DAYS: Final = 3650
CLOCK_SLACK: Final = datetime.timedelta(days=1)  # for a clock that is a little behind


@dataclass(frozen=True)
class Authority:
    """The certificate of an authority, and the key that signs for it."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def certificate_pem(self) -> bytes:
        """Return the certificate, which everybody may have."""
        return self.certificate.public_bytes(Encoding.PEM)

    def pem(self) -> bytes:
        """Return certificate and key; whoever has the key gets in everywhere."""
        return self.certificate_pem() + _private_pem(self.key)


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes


def new_authority(days: int = AUTHORITY_DAYS) -> Authority:
    """Make an authority that signs certificates, and no further authorities."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(AUTHORITY_NAME)
    certificate = (
        _begun(name, key.public_key(), name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def read_authority(pem: bytes) -> Authority:
    """Read one as `Authority.pem` writes it.

    Raises
    ------
    ValueError
        That is no certificate of an authority, or not its key.
    """
    certificate = x509.load_pem_x509_certificate(pem)
    try:
        key = load_pem_private_key(pem[pem.index(b"-----END CERTIFICATE-----") :], None)
    except TypeError as error:  # it wants a password
        raise ValueError(str(error)) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ValueError("the key is not that of the certificate")
    return Authority(certificate, key)


def issue(
    authority: Authority, common_name: str, hosts: Sequence[str], days: int, *, listens: bool = True
) -> Issued:
    """Sign a certificate for a new key.

    Parameters
    ----------
    hosts
        DNS names and addresses by which others call its holder.
    listens
        Others may connect to its holder; without, it only connects to others.

    Raises
    ------
    ValueError
        A name cannot stand in a certificate.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    uses = [Usage.SERVER_AUTH, Usage.CLIENT_AUTH] if listens else [Usage.CLIENT_AUTH]
    builder = (
        _begun(
            _name(common_name),
            key.public_key(),
            authority.certificate.subject,
            authority.key.public_key(),
            days,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    )
    if hosts:
        names = x509.SubjectAlternativeName([general_name(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    certificate = builder.sign(authority.key, hashes.SHA256())
    return Issued(certificate.public_bytes(Encoding.PEM), _private_pem(key))


def general_name(host: str) -> x509.GeneralName:
    """Return a host as it stands in a certificate. Raises ValueError for what can be none."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.removeprefix("*.").split(".")
    if not all(label and all(c.isascii() and (c.isalnum() or c in "-_") for c in label) for label in labels):
        raise ValueError(f"{host!r} is neither a host name nor an address")
    return x509.DNSName(host)


def is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Say whether an authority has signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _begun(
    subject: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SLACK)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip
