"""Finding the Pythons of a machine: probed once, broken ones passed over, the running one first."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
import pytest

from modelops.environments import Interpreters
from modelops.environments.interpreters import Interpreter
from modelops.errors import BundleError, NoInterpreterError

OWN = f"{sys.version_info[0]}.{sys.version_info[1]}"


def only(folder: Path, *pythons: Path, home: Path | None = None) -> Interpreters:
    """Look at the running interpreter and these, and at nothing else that lies on this machine."""
    environ = {
        "PATH": str(folder),
        "HOME": str(home or folder),
        "MODELOPS_PYTHONS": os.pathsep.join(map(str, pythons)),
    }
    return Interpreters(folder / "memory.json", environ=environ)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_the_running_interpreter_comes_first(tmp_path: Path) -> None:
    found = Interpreters(tmp_path / "memory.json").all()

    assert found[0].version == "{}.{}.{}".format(*sys.version_info[:3])
    assert found[0].prefix == os.path.realpath(sys.base_prefix)
    assert len({i.prefix for i in found}) == len(found)
    assert all(Path(i.executable).is_absolute() for i in found)


def test_nothing_is_started_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Interpreters(tmp_path / "memory.json").all()
    monkeypatch.setattr("modelops.environments.interpreters._ask", lambda path: pytest.fail(f"{path} probed"))

    assert Interpreters(tmp_path / "memory.json").all() == first


def test_an_interpreter_that_changed_is_probed_again(tmp_path: Path) -> None:
    fake = script(tmp_path / "fake-python", "no interpreter")
    interpreters = only(tmp_path, fake)
    assert len([i for i in interpreters.all() if i.executable == str(fake)]) == 0

    real = only(tmp_path).all()[0]
    fake.unlink()
    fake.write_bytes(Path(real.executable).read_bytes())
    fake.chmod(0o755)
    memory = (tmp_path / "memory.json").read_bytes()
    interpreters.all()

    assert (tmp_path / "memory.json").read_bytes() != memory


def asked(path: Path) -> Interpreter:
    return Interpreter(str(path), "3.12.1", "cpython", "linux-x86_64", "2.36", "abi", str(path))


def test_a_program_in_the_place_of_another_is_told_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelops.environments.interpreters._ask", asked)
    program = script(tmp_path / "python3.12", "\x7fELF")

    def found() -> Interpreter:
        (one,) = (i for i in only(tmp_path).all() if i.executable == str(program))
        return one

    before = found()
    assert found() == before, "also as it is remembered"
    os.utime(program, (1, 1))
    assert found() == msgspec.structs.replace(before, mark=found().mark)
    assert found() != before


def test_launchers_and_broken_programs_are_passed_over_and_launchers_are_not_started(tmp_path: Path) -> None:
    marker = tmp_path / "started"
    before = only(tmp_path).all()
    script(tmp_path / "python3.12", f"#!/bin/sh\ntouch {marker}\n")
    script(tmp_path / "python3.13", "\x7fELF and then nothing of use")
    (tmp_path / "python3.14").symlink_to(tmp_path / "nowhere")
    (tmp_path / "python3").mkdir()

    assert only(tmp_path, Path("/no/such/python")).all() == before
    assert not marker.exists()


def test_damaged_memory_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text('{"format": 1, "probed": [')

    assert only(tmp_path).all()


def test_memory_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert Interpreters(tmp_path / "file" / "memory.json", environ={}).all()


def test_no_interpreter_lists_those_that_were_found(tmp_path: Path) -> None:
    interpreters = only(tmp_path)

    with pytest.raises(NoInterpreterError, match=r">=3\.9,<3\.10.*" + OWN.replace(".", r"\.")) as caught:
        interpreters.find(">=3.9,<3.10")

    assert caught.value.found == tuple(map(str, interpreters.all()))


def test_requires_python_and_pin_must_both_fit(tmp_path: Path) -> None:
    interpreters = only(tmp_path)

    assert interpreters.find(f"=={OWN}.*", OWN).python_version == OWN
    assert interpreters.find(None, None).python_version == OWN
    with pytest.raises(NoInterpreterError, match=r"2\.7 \(\.python-version\)"):
        interpreters.find(">=3.9", "2.7")
    with pytest.raises(NoInterpreterError):
        interpreters.find(None, f"{OWN}.99")


def test_a_specifier_that_is_none_is_the_bundles_fault(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="requires-python"):
        only(tmp_path).find("three point eleven")


def test_others_are_found_newest_first_and_by_their_version(tmp_path: Path) -> None:
    interpreters = Interpreters(tmp_path / "memory.json")
    others = [i for i in interpreters.all() if i.python_version != OWN and i.implementation == "cpython"]
    if len(others) < 2:
        pytest.skip("this machine has too few Pythons")

    versions = [tuple(map(int, i.python_version.split("."))) for i in others]
    assert versions == sorted(versions, reverse=True)
    usable = [i for i in others if tuple(map(int, i.python_version.split("."))) >= (3, 9)]
    for interpreter in usable:
        assert (
            interpreters.find(f"=={interpreter.python_version}.*").python_version
            == interpreter.python_version
        )


def test_what_was_listed_once_is_looked_at_again_only_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelops.environments.interpreters._ask", asked)
    listed: list[str] = []
    list_folder = os.listdir

    def listing(folder: str | Path) -> list[str]:
        listed.append(str(folder))
        return list_folder(folder)

    monkeypatch.setattr(os, "listdir", listing)
    path, elsewhere = tmp_path / "path", tmp_path / "elsewhere"
    script(elsewhere / "launcher", "#!/bin/sh\n")
    path.mkdir()
    (path / "python3").symlink_to(elsewhere / "launcher")
    os.utime(path, (1, 1))  # long ago
    interpreters = only(tmp_path)
    interpreters._environ = {**interpreters._environ, "PATH": str(path)}

    def found() -> list[str]:
        listed.clear()
        return [Path(i.executable).name for i in interpreters.all() if i.executable.startswith(str(tmp_path))]

    assert found() == []
    assert str(path) in listed
    assert found() == []
    assert str(path) not in listed

    (elsewhere / "launcher").unlink()  # where a link leads: the folder of the link stays as it is
    script(elsewhere / "launcher", "\x7fELF")
    assert found() == ["launcher"]
    script(path / "python3.14", "\x7fELF")
    assert found() == ["launcher", "python3.14"]
    script(path / "python3.15", "\x7fELF")  # within a tick of the one before
    assert found() == ["launcher", "python3.14", "python3.15"]
    (path / "python3").unlink()
    assert found() == ["python3.14", "python3.15"]
