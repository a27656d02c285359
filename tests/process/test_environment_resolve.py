"""Resolving: every kind of input, a lock used again, and failures told apart and remembered."""

from __future__ import annotations

import socket
import subprocess
import textwrap
import tomllib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from modelops.environments import Environment, Environments, Interpreters, parse_lock
from modelops.environments.uv import find_uv
from modelops.errors import IndexUnreachableError, ResolutionError

if TYPE_CHECKING:
    from pathlib import Path

SIX_WHEEL = "4721f391ed90541fddacab5acf947aa0d3dc7d27b2e1e8eda2be8970586c3274"
SIX_SDIST = "ff70335d468e7eb6ec65b95b99d3a2836546063f63acc5171de367e834932a81"
PROJECT = '[project]\nname = "m"\nversion = "1"\nrequires-python = ">=3.9"\ndependencies = ["six==1.17.0"]\n'


def run(environment: Environment, code: str) -> str:
    return subprocess.run(
        [environment.python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(textwrap.dedent(text))
    return folder


def locked(text: str) -> dict[str, str]:
    return {p["name"]: p["version"] for p in tomllib.loads(text)["packages"]}


class CountedUv:
    """uv behind a script that notes every call."""

    def __init__(self, folder: Path) -> None:
        self._calls = folder / "calls"
        self.path = folder / "counted-uv"
        self.path.write_text(f'#!/bin/sh\necho "$@" >> "{self._calls}"\nexec "{find_uv()}" "$@"\n')
        self.path.chmod(0o755)

    @property
    def n_calls(self) -> int:
        return len(self._calls.read_text().splitlines()) if self._calls.exists() else 0


@pytest.fixture
def uv(tmp_path: Path) -> CountedUv:
    return CountedUv(tmp_path)


@pytest.fixture
def environments(tmp_path: Path, uv: CountedUv) -> Environments:
    return Environments(tmp_path / "cache", uv=uv.path)


def test_project_dependencies_are_resolved(environments: Environments, tmp_path: Path) -> None:
    lock = environments.resolve(write(tmp_path / "m", pyproject__toml=PROJECT))

    assert locked(lock.text) == {"six": "1.17.0"}
    assert parse_lock(lock.text) == lock
    assert run(environments.ensure(lock), "import six; print(six.__version__)") == "1.17.0"


def test_a_lock_that_was_made_for_the_same_inputs_is_known_and_none_is_made_by_asking(
    environments: Environments, uv: CountedUv, tmp_path: Path
) -> None:
    bundle = write(tmp_path / "m", pyproject__toml=PROJECT)
    assert environments.known_lock(bundle) is None
    lock = environments.resolve(bundle)
    n_calls = uv.n_calls
    assert environments.known_lock(bundle) == lock
    write(bundle, pyproject__toml=PROJECT.replace("six==1.17.0", "six==1.16.0"))
    assert environments.known_lock(bundle) is None
    assert uv.n_calls == n_calls


def test_uv_lock_is_taken_as_it_is_without_the_project(environments: Environments, tmp_path: Path) -> None:
    root = write(tmp_path / "m", pyproject__toml=PROJECT.replace("1.17.0", "1.16.0"))
    python = Interpreters(tmp_path / "memory").all()[0].executable
    subprocess.run([find_uv(), "lock", "-q", "--python", python], cwd=root, check=True)
    (root / "pyproject.toml").write_text(PROJECT.replace("==1.17.0", ""))
    before = (root / "uv.lock").read_bytes()

    lock = environments.resolve(root)

    assert locked(lock.text) == {"six": "1.16.0"}
    assert (root / "uv.lock").read_bytes() == before
    assert run(environments.ensure(lock), "import six; print(six.__version__)") == "1.16.0"


def test_pylock_toml_is_taken_as_it_is_without_uv(
    environments: Environments, tmp_path: Path, uv: CountedUv
) -> None:
    text = environments.resolve(write(tmp_path / "a", requirements__txt="six==1.16.0\n")).text
    plain = text[: text.index("[tool.modelops]")]
    before = uv.n_calls

    lock = environments.resolve(write(tmp_path / "b", pylock__toml=plain))

    assert uv.n_calls == before
    assert run(environments.ensure(lock), "import six; print(six.__version__)") == "1.16.0"


def test_pep_723_metadata_is_resolved_and_an_edit_of_the_code_resolves_nothing(
    environments: Environments, tmp_path: Path, uv: CountedUv
) -> None:
    script = """
        # /// script
        # requires-python = ">=3.9"
        # dependencies = ["six==1.17.0"]
        # ///
        import six
        """
    lock = environments.resolve(write(tmp_path / "coin", coin__py=script))
    n_calls = uv.n_calls

    again = environments.resolve(write(tmp_path / "coin", coin__py=script + "print(six)\n"))

    assert again == lock
    assert uv.n_calls == n_calls
    assert run(environments.ensure(lock), "import six; print(six.__version__)") == "1.17.0"


def test_requirements_with_the_right_hashes_lock_only_the_listed_files(
    environments: Environments, tmp_path: Path
) -> None:
    root = write(tmp_path / "m", requirements__txt=f"six==1.17.0 \\\n    --hash=sha256:{SIX_SDIST}\n")
    lock = environments.resolve(root)

    assert SIX_SDIST in lock.text
    assert SIX_WHEEL not in lock.text
    assert run(environments.ensure(lock), "import six; print(six.__version__)") == "1.17.0"


@pytest.mark.parametrize(
    ("requirements", "words"),
    [
        (f"six==1.17.0 --hash=sha256:{'0' * 64}\n", "hash mismatch for six"),
        (f"idna\nsix==1.17.0 --hash=sha256:{SIX_WHEEL}\n", "lists none for idna"),
        ("--require-hashes\nsix==1.17.0\n", "lists none for six"),
    ],
    ids=["wrong hash", "one without hash", "required, none listed"],
)
def test_requirements_with_wrong_or_missing_hashes_are_refused(
    requirements: str, words: str, environments: Environments, tmp_path: Path
) -> None:
    with pytest.raises(ResolutionError, match=words):
        environments.resolve(write(tmp_path / "m", requirements__txt=requirements))


def test_a_lock_is_used_again_while_its_inputs_are_the_same(
    environments: Environments, tmp_path: Path, uv: CountedUv
) -> None:
    root = write(tmp_path / "m", requirements__txt="six==1.17.0\n")
    first = environments.resolve(root)
    elsewhere = write(tmp_path / "other" / "name", requirements__txt="six==1.17.0\n", model__py="x = 1")

    assert environments.resolve(elsewhere) == first
    assert uv.n_calls == 1
    assert environments.resolve(root, upgrade=True) == first
    assert uv.n_calls == 2
    assert environments.resolve(write(root, requirements__txt="six==1.16.0\n")) != first
    assert uv.n_calls == 3


def test_a_python_version_file_picks_the_interpreter(environments: Environments, tmp_path: Path) -> None:
    found = environments.interpreters.all()
    other = next((i for i in found if i.python_version in ("3.10", "3.12", "3.13")), None)
    if other is None:
        pytest.skip("this machine has one Python only")
    root = write(tmp_path / "m", requirements__txt="six\n")
    (root / ".python-version").write_text(f"{other.python_version}\n")

    assert environments.resolve(root).python_version == other.python_version


def test_a_local_package_of_the_bundle_is_installed_from_the_bundles_folder(
    environments: Environments, tmp_path: Path
) -> None:
    root = write(tmp_path / "m", requirements__txt="./libs/local\n")
    write(
        root / "libs" / "local",
        pyproject__toml="""
        [build-system]
        requires = ["flit_core"]
        build-backend = "flit_core.buildapi"
        [project]
        name = "local"
        version = "1"
        description = "x"
        """,
        local__py="answer = 1\n",
    )
    lock = environments.resolve(root)
    first = environments.ensure(lock, bundle_root=root)
    assert run(first, "import local; print(local.answer)") == "1"
    assert not (root / "libs" / "local" / "build").exists()

    write(root / "libs" / "local", local__py="answer = 2\n")
    second = environments.ensure(environments.resolve(root), bundle_root=root)

    assert run(second, "import local; print(local.answer)") == "2"


def test_a_local_package_is_found_when_the_cache_is_a_link_to_another_folder(tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "volume")
    root = write(tmp_path / "m", requirements__txt="./libs/local\n")
    write(
        root / "libs" / "local",
        pyproject__toml="""
        [build-system]
        requires = ["flit_core"]
        build-backend = "flit_core.buildapi"
        [project]
        name = "local"
        version = "1"
        description = "x"
        """,
        local__py="answer = 1\n",
    )
    environments = Environments(tmp_path / "link")

    environment = environments.ensure(environments.resolve(root), bundle_root=root)

    assert run(environment, "import local; print(local.answer)") == "1"


def test_a_dependency_that_does_not_exist_is_final_and_remembered_with_uvs_words(
    environments: Environments, tmp_path: Path, uv: CountedUv
) -> None:
    root = write(tmp_path / "m", requirements__txt="modelops-test-no-such-package-at-all\n")

    for _ in range(2):
        with pytest.raises(
            ResolutionError, match="modelops-test-no-such-package-at-all was not found"
        ) as caught:
            environments.resolve(root)
        assert caught.value.what == "m/requirements.txt"
        assert uv.n_calls == 1
    with pytest.raises(ResolutionError):
        Environments(tmp_path / "cache", uv=uv.path).resolve(root)
    assert uv.n_calls == 1
    with pytest.raises(ResolutionError):
        environments.resolve(root, upgrade=True)
    assert uv.n_calls == 2


def test_threads_that_ask_together_share_one_failure(
    environments: Environments, tmp_path: Path, uv: CountedUv
) -> None:
    root = write(tmp_path / "m", requirements__txt="modelops-test-no-such-package-at-all\n")

    def error(_: int) -> str:
        with pytest.raises(ResolutionError) as caught:
            environments.resolve(root)
        return str(caught.value)

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(error, range(8)))) == 1
    assert uv.n_calls == 1


def test_an_index_that_refuses_connections_is_worth_a_retry(
    environments: Environments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{closed.getsockname()[1]}/simple")
        monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
        monkeypatch.setenv("UV_HTTP_RETRIES", "0")

        with pytest.raises(IndexUnreachableError, match="refused"):
            environments.resolve(write(tmp_path / "m", requirements__txt="six\n"))


def test_a_second_job_tries_an_unreachable_index_again_and_succeeds(
    environments: Environments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path / "m", requirements__txt="six==1.17.0\n")
    lock = environments.resolve(write(tmp_path / "other", requirements__txt="six==1.17.0\nidna\n"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    monkeypatch.setenv("UV_OFFLINE", "1")
    with pytest.raises(IndexUnreachableError):
        environments.resolve(root)
    with pytest.raises(IndexUnreachableError):
        environments.ensure(lock)
    assert environments.list() == []

    monkeypatch.delenv("UV_OFFLINE")

    assert environments.ensure(environments.resolve(root)).built
    assert environments.ensure(lock).built
