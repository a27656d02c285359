"""A server's certificate is read again when its files have changed, and a wrong one changes nothing."""

from __future__ import annotations

import logging
import shutil
import socket
import ssl
import threading
from typing import TYPE_CHECKING

from modelops.cluster.certificates import create_certificates
from modelops.server.https import Certificate

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def shown(certificate: Certificate) -> bytes:
    """Return the certificate that a client sees which connects now."""
    mine, theirs = socket.socketpair()

    def serve() -> None:
        with certificate.context.wrap_socket(theirs, server_side=True) as wrapped:
            wrapped.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    with trusting.wrap_socket(mine) as wrapped:
        found = wrapped.getpeercert(binary_form=True)
        wrapped.send(b"x")
    thread.join()
    assert found is not None
    return found


def test_new_connections_get_the_certificate_that_the_files_hold_now(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("first", "second"):
        create_certificates(tmp_path / name, [])
    secret = tmp_path / "secret"  # as Kubernetes does it: a link to a folder, which is replaced
    secret.symlink_to(tmp_path / "first/server")
    certificate = Certificate(secret / "cert.pem", secret / "key.pem")
    first = shown(certificate)
    assert not certificate.look()
    (tmp_path / "next").symlink_to(tmp_path / "second/server")
    (tmp_path / "next").replace(secret)
    assert certificate.look()
    second = shown(certificate)
    assert second == ssl.PEM_cert_to_DER_cert((tmp_path / "second/server/cert.pem").read_text())
    assert second != first

    shutil.copy(
        tmp_path / "first/server/cert.pem", tmp_path / "second/server/cert.pem"
    )  # its key comes later
    with caplog.at_level(logging.WARNING, "modelops.server.https"):
        assert not certificate.look()
        assert not certificate.look()
    assert len(caplog.records) == 1, "it is told once"
    assert shown(certificate) == second
    shutil.copy(tmp_path / "first/server/key.pem", tmp_path / "second/server/key.pem")
    assert certificate.look()
    assert shown(certificate) == first
    (tmp_path / "second/server/key.pem").unlink()
    assert not certificate.look()
    assert shown(certificate) == first
