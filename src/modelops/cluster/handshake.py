"""Why a process of a pool and its scheduler do not understand one another: which certificate, of which authority.

Dask tries again without a word. All authorities that `modelops certs create` makes have one name, so they are told
apart by the beginning of the identifier of their key, as ``openssl x509 -text`` shows it.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from distributed.comm.addressing import get_address_host_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed.security import Security

    from modelops.cluster.tls import Part

TIMEOUT_S: Final = 10.0
SHOWN_BYTES: Final = 6
WHAT_TO_DO: Final = (
    "All parts of a pool need valid certificates of one authority: give them those of one folder of 'modelops certs' "
    "(docs/how-to/certificates.md)"
)


def why_no_handshake(
    address: str, security: Security, part: Part, *, who: str, timeout_s: float = TIMEOUT_S
) -> str:
    """Shake hands with a scheduler; return what does not fit and what to do, or nothing if all fits.

    Parameters
    ----------
    part
        As whom, for Dask.
    who
        As whom, for people.

    Raises
    ------
    OSError
        Nobody answers there, which says nothing of certificates.
    """
    context: ssl.SSLContext = security.get_connection_args(part)["ssl_context"]
    files = security.get_tls_config_for_role(part)
    try:
        with _connected(address, context, timeout_s) as stream:
            # Who is refused hears of it only now: in TLS 1.3 the side that connects has finished first. If all is
            # well, the scheduler speaks first.
            stream.recv(1)
    except ssl.SSLCertVerificationError as error:
        theirs = _shown_by(address, files, timeout_s)
        return (
            f"the certificate of the scheduler {address} is not accepted here, {error.verify_message}: it is "
            f"{_described(theirs)}; this {who} trusts {_trusted(files['ca_file'])}. {WHAT_TO_DO}"
        )
    except ssl.SSLError as error:
        if (
            "ALERT" in (error.reason or "")
            and (error.reason or "").rpartition("ALERT_")[2] in _OF_CERTIFICATES
        ):
            ours = x509.load_pem_x509_certificate(Path(files["cert"]).read_bytes())
            return (
                f"the scheduler {address} does not accept the certificate of this {who}, {_said(error)}: it is "
                f"{_described(ours)}, in {files['cert']}. {WHAT_TO_DO}"
            )
        return f"the scheduler {address} and this {who} do not understand one another: {_said(error)}"
    return ""


# What OpenSSL calls the alerts that are about the certificate of who is told.
_OF_CERTIFICATES: Final = frozenset(
    {"UNKNOWN_CA", "BAD_CERTIFICATE", "CERTIFICATE_EXPIRED", "CERTIFICATE_REVOKED", "CERTIFICATE_UNKNOWN",
     "UNSUPPORTED_CERTIFICATE", "CERTIFICATE_REQUIRED", "DECRYPT_ERROR", "ACCESS_DENIED"}
)  # fmt: skip


@contextlib.contextmanager
def _connected(address: str, context: ssl.SSLContext, timeout_s: float) -> Iterator[ssl.SSLSocket]:
    host, port = get_address_host_port(address)
    with (
        socket.create_connection((host, port), timeout=timeout_s) as plain,
        context.wrap_socket(plain, server_hostname=host) as stream,
    ):
        yield stream


def _shown_by(address: str, files: dict[str, str], timeout_s: float) -> x509.Certificate | None:
    """Return the certificate that the scheduler shows; None if it does not even show that."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # it is to be looked at, and nothing said
    context.load_cert_chain(files["cert"], files["key"])
    try:
        with _connected(address, context, timeout_s) as stream:
            shown = stream.getpeercert(binary_form=True)
    except OSError:
        return None
    return None if shown is None else x509.load_der_x509_certificate(shown)


def _trusted(file: str) -> str:
    authorities = x509.load_pem_x509_certificates(Path(file).read_bytes())
    named = " and ".join(f"{_name(a.subject)} ({_key(a, x509.SubjectKeyIdentifier)})" for a in authorities)
    return f"{named}, in {file}"


def _described(certificate: x509.Certificate | None) -> str:
    if certificate is None:
        return "not to be seen"
    until = certificate.not_valid_after_utc
    return (
        f"{_name(certificate.subject)} of the authority {_name(certificate.issuer)} "
        f"({_key(certificate, x509.AuthorityKeyIdentifier)}), valid until {until:%Y-%m-%d %H:%M} UTC"
    )


def _name(name: x509.Name) -> str:
    return f"'{name.rfc4514_string()}'"


def _key(
    certificate: x509.Certificate, kind: type[x509.SubjectKeyIdentifier | x509.AuthorityKeyIdentifier]
) -> str:
    try:
        found = certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return "key not said"
    key = found.digest if isinstance(found, x509.SubjectKeyIdentifier) else found.key_identifier
    return f"key {(key or b'')[:SHOWN_BYTES].hex(':').upper()}..."


def _said(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")
