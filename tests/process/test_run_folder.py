"""What the run folder says: locks are facts, files are hints, and all of it is for one user."""

from __future__ import annotations

import ssl
import subprocess
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from modelops.cluster import authority
from modelops.cluster.handles import Handle
from modelops.cluster.run_folder import RunFolder, write_private
from modelops.cluster.tls import ensure_certificates, is_good
from modelops.errors import StorageError
from modelops.home import Home
from modelops.settings import TLS_FILES
from modelops.store import Objects, Records

if TYPE_CHECKING:
    from pathlib import Path

HOLD = """
import os, sys
from modelops.cluster.run_folder import RunFolder
from modelops.home import Home
from modelops.settings import TLS_FILES
hold = RunFolder(Home.from_environ(os.environ)).hold("server", by_hand=True)
print(hold is not None, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(Home.at(tmp_path / "home"))


def test_a_role_is_held_by_one_living_process(run: RunFolder) -> None:
    environ = {"MODELOPS_HOME": str(run.home.data)}
    assert run.holder("server") is None
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        assert run.holder("server") == run.held_by_hand("server") == process.pid
        assert run.hold("server") is None
        assert run.roles() == ["server"]
        handle = Handle.of_role(run, "server")
        assert handle is not None
        with handle:
            assert handle.alive
            process.kill()
            assert handle.wait(60)
            assert not handle.alive
            handle.signal(9)  # whoever has its pid by now is not meant
    assert run.holder("server") is run.held_by_hand("server") is None
    assert Handle.of_role(run, "server") is None
    hold = run.hold("server")
    assert hold is not None
    assert run.hold("server") is None
    assert run.read("server.lock") == {}  # reading it would give it up
    assert run.holder("server") is not None
    hold.release()
    assert run.holder("server") is None


def test_only_one_may_start_or_end_the_pool(run: RunFolder) -> None:
    with run.alone(), pytest.raises(BlockingIOError), run.alone(nonblocking=True):
        pass
    with run.alone(nonblocking=True):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'"x"'])
def test_a_file_that_was_not_written_by_us_says_nothing(run: RunFolder, content: bytes) -> None:
    (run.path / "server.json").write_bytes(content)
    assert run.read("server.json") == {}


def test_the_token_is_made_once_and_again_if_others_could_have_read_it(run: RunFolder) -> None:
    token = run.token()
    assert len(token) >= 32
    assert run.token() == token
    assert (run.path / "token").stat().st_mode & 0o777 == 0o600
    (run.path / "token").chmod(0o644)
    assert run.token() != token
    run.keep_token("of my own")
    assert run.token() == "of my own"


@pytest.mark.parametrize("left", [b"", b"\n", bytes(43), b"abc" + bytes(40), b"\xff" * 43])
def test_a_token_that_a_crash_has_left_without_its_text_is_made_anew(run: RunFolder, left: bytes) -> None:
    token = run.token()
    (run.path / "token").write_bytes(left)
    again = run.token()
    assert again != token
    assert again == run.token()
    assert again.isprintable()
    assert len(again) == len(token)


def test_what_is_made_of_a_home_is_for_its_user_only(tmp_path: Path) -> None:
    home = Home.at(tmp_path / "above" / "home")
    Objects.open(home.storage)
    for folder in (tmp_path / "above", home.data, home.objects):
        assert folder.stat().st_mode & 0o777 == 0o700
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    Records.open(Home.at(shared).database_url).close()
    assert shared.stat().st_mode & 0o777 == 0o755


def test_the_folder_is_for_its_user_only_and_made_so_again(run: RunFolder) -> None:
    assert run.path.stat().st_mode & 0o777 == 0o700
    run.path.chmod(0o755)
    assert RunFolder(run.home).path.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/home/state/run cannot be used .*; set MODELOPS_HOME"):
        RunFolder(Home.at(tmp_path / "file" / "home"))


def test_certificates_are_made_once_and_anew_when_a_file_is_not_good(tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    ensure_certificates(folder)
    made = {name: (folder / name).read_bytes() for name in TLS_FILES}
    ensure_certificates(folder)
    assert {name: (folder / name).read_bytes() for name in TLS_FILES} == made
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    assert not is_good(folder, days=100_000)
    for name in TLS_FILES:
        good = (folder / name).read_bytes()
        for bad in (b"", good[:100], made["key.pem"] if name != "key.pem" else made["ca.pem"]):
            write_private(folder / name, bad)
            assert not is_good(folder), (name, bad)
        write_private(folder / name, good)
        assert is_good(folder)
    (folder / "key.pem").chmod(0o644)
    assert not is_good(folder)
    ensure_certificates(folder)
    assert is_good(folder)
    assert (folder / "key.pem").read_bytes() != made["key.pem"]
    assert {p.name for p in folder.iterdir()} == set(TLS_FILES)


def test_certificates_that_were_made_while_the_clock_was_ahead_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tls"
    with monkeypatch.context() as ahead:
        ahead.setattr(authority, "CLOCK_SLACK", timedelta(days=-400))
        ensure_certificates(folder)
    assert not is_good(folder)
    ensure_certificates(folder)
    assert is_good(folder)
