"""Certificates of several machines: what each role may do with its own, and that all can be replaced as they run."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509

from modelops.cluster import certificates
from modelops.cluster.authority import new_authority
from modelops.cluster.certificates import (
    ROLES,
    begin_authority,
    create_certificates,
    forget_old_authorities,
    list_certificates,
    renew_certificates,
)
from modelops.cluster.tls import security
from modelops.errors import ClusterError, ConflictError, NotFoundError, RequestError
from modelops.settings import TLS_FILES, TLS_FILES_OF_SECRETS, Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modelops.cluster.tls import Part

COMMAND = Path(sys.executable).parent / "modelops"
PARTS: Mapping[str, Part] = {
    "scheduler": "scheduler",
    "worker": "worker",
    "server": "client",
    "client": "client",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs") / "pool"
    create_certificates(folder, ["modelops.example", "10.0.0.1"])
    return folder


def shakes_hands(listening: Path, connecting: Path) -> bool:
    """Say whether the holders of two folders accept one another, as Dask lets them talk."""
    contexts = [
        security(listening, "scheduler").get_listen_args("scheduler")["ssl_context"],
        security(connecting, "client").get_connection_args("client")["ssl_context"],
    ]
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        contexts[0].wrap_bio(there, back, server_side=True),
        contexts[1].wrap_bio(back, there, server_side=False),
    ]
    done: set[int] = set()
    for _ in range(6):
        for n, end in enumerate(ends):
            try:
                end.do_handshake()
                done.add(n)
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError:
                return False
    return len(done) == 2


def test_every_role_gets_in_with_its_certificate_and_nobody_with_one_of_another_pool(
    made: Path, tmp_path: Path
) -> None:
    create_certificates(tmp_path / "other", [])
    for role in ROLES:
        assert shakes_hands(made / "scheduler", made / role)
        assert not shakes_hands(made / "scheduler", tmp_path / "other" / role)


def test_a_client_cannot_pass_for_a_scheduler(made: Path) -> None:
    assert not shakes_hands(made / "client", made / "worker")
    assert shakes_hands(made / "worker", made / "worker")


def test_only_its_user_may_read_what_is_made(made: Path) -> None:
    for path in (made, *made.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path
    assert [p.name for p in made.rglob("authority.pem")] == [
        "authority.pem"
    ]  # the key that signs is in no role's folder
    keys = {role: (made / role / "key.pem").read_bytes() for role in ROLES}
    assert len(set(keys.values())) == len(ROLES)


def test_names_of_hosts_stand_in_the_certificates_of_those_that_are_called_by_them(made: Path) -> None:
    for role in ("server", "scheduler"):
        certificate = x509.load_pem_x509_certificate((made / role / "cert.pem").read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["modelops.example", "localhost"]
        assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "127.0.0.1"]


@pytest.mark.parametrize("role", ROLES)
def test_dask_itself_finds_them_by_its_own_configuration(made: Path, role: str) -> None:
    part = PARTS[role]
    code = (
        "import dask, distributed; from distributed.security import Security; s = Security();"
        f"print(s.require_encryption, s.tls_ca_file, s.tls_{part}_cert, s.tls_{part}_key);"
        "from modelops.cluster.tls import dask_names_certificates as d; print(d())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"DASK_CONFIG": str(made / role / "dask.yaml"), "PATH": "/usr/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    ca, cert, key = (made / role / name for name in TLS_FILES)
    assert done.stdout.splitlines() == [f"True {ca} {cert} {key}", "True"]


def test_a_part_takes_them_from_dasks_configuration_when_no_setting_names_any(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dask

    ca, cert, _ = (str(made / "worker" / name) for name in TLS_FILES)
    with dask.config.set({"distributed.comm.tls.ca-file": ca, "distributed.comm.tls.worker.cert": cert}):
        found = security(None, "worker")
        assert found.require_encryption
        assert found.get_tls_config_for_role("worker")["cert"] == cert
        with pytest.raises(ClusterError, match=r"distributed\.comm\.tls\.scheduler\.cert"):
            security(None, "scheduler")
        with (
            dask.config.set({"distributed.comm.tls.worker.key": "/no/such/key"}),
            pytest.raises(ClusterError),
        ):
            security(None, "worker")


def test_a_secret_of_kubernetes_is_as_good_as_a_folder(made: Path, tmp_path: Path) -> None:
    for ours, theirs in zip(TLS_FILES, TLS_FILES_OF_SECRETS, strict=True):
        (tmp_path / theirs).write_bytes((made / "worker" / ours).read_bytes())
    found = Settings.read({"MODELOPS_HOME": str(tmp_path), "MODELOPS_TLS": str(tmp_path)}).tls
    assert found == tmp_path
    assert shakes_hands(made / "scheduler", tmp_path)
    (tmp_path / "ca.crt").unlink()
    with pytest.raises(RequestError, match=r"has no ca\.crt"):
        _ = Settings.read({"MODELOPS_HOME": str(tmp_path), "MODELOPS_TLS": str(tmp_path)}).tls


def test_while_the_authority_is_replaced_everybody_gets_in_at_every_moment(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    create_certificates(folder, ["a.example"], at=Path("/etc/modelops/tls"))
    states = [folder]

    def step(name: str) -> None:
        import shutil

        shutil.copytree(folder, tmp_path / name)
        states.append(tmp_path / name)
        for one, other in ((states[-2], states[-1]), (states[-1], states[-2]), (states[-1], states[-1])):
            assert shakes_hands(one / "scheduler", other / "worker"), f"{one.name} and {other.name}"

    step("0 as made")
    begin_authority(folder)
    step("1 both are trusted")
    with pytest.raises(ConflictError, match="of an older authority"):
        forget_old_authorities(folder)
    renew_certificates(folder)
    step("2 certificates of the new one")
    forget_old_authorities(folder)
    step("3 the old one is forgotten")
    assert not shakes_hands(states[1] / "scheduler", states[-1] / "worker")
    kept = {k.role: k for k in list_certificates(folder)}
    assert set(kept) == {"authority", *ROLES}
    assert "a.example" in kept["server"].hosts  # renewed with the names it had
    assert {k.signed_by for k in kept.values()} == {kept["authority"].serial}
    assert "/etc/modelops/tls/ca.pem" in (folder / "worker" / "dask.yaml").read_text()


def test_what_is_there_is_not_overwritten_and_what_is_not_there_is_not_renewed(
    made: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConflictError, match="not empty"):
        create_certificates(made, [])
    for act in (begin_authority, renew_certificates, forget_old_authorities, list_certificates):
        with pytest.raises(NotFoundError, match="has no authority"):
            act(tmp_path)
    with pytest.raises(RequestError, match="neither a host name nor an address"):
        create_certificates(tmp_path / "new", ["https://a.example"])
    assert not (tmp_path / "new").exists()


def test_the_command_says_until_when_and_warns_in_time(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([COMMAND, "certs", *arguments], capture_output=True, text=True, check=False)

    folder = str(tmp_path / "pool")
    made = run("create", folder, "--host", "a.example", "--json")
    rows = json.loads(made.stdout)["certificates"]
    assert [row["role"] for row in rows] == ["authority", *ROLES]
    assert rows[1]["hosts"] == ["a.example", "localhost", "127.0.0.1"]
    assert run("show", folder).returncode == 0
    assert run("renew", folder, "--days", "20").returncode == 0
    late = run("show", folder)
    assert late.returncode == 1
    assert "warning: the certificate of worker ends soon" in late.stderr
    refused = run("create", folder)
    assert (refused.returncode, "not empty" in refused.stderr) == (2, True)


def test_the_warning_says_what_has_ended_and_how_an_authority_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "new_authority", lambda: new_authority(days=20))
    create_certificates(tmp_path / "pool", [], days=-1)
    said = subprocess.run(
        [COMMAND, "certs", "show", str(tmp_path / "pool")], capture_output=True, text=True, check=False
    )
    assert said.returncode == 1
    warnings = said.stderr.splitlines()
    assert (
        warnings[0]
        == "warning: the certificate of authority ends soon; 'modelops certs renew --authority' makes another"
    )
    assert (
        warnings[-1] == "warning: the certificate of client has ended; 'modelops certs renew' makes another"
    )
