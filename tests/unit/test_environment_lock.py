"""Locks and keys: what they say, and what leaves them as they are."""

from __future__ import annotations

import datetime
import pickle
import tomllib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelops.environments import Interpreter, parse_lock
from modelops.environments.collect import EnvironmentInfo, choose
from modelops.environments.lock import (
    EMPTY,
    _toml,
    check_hashes,
    environment_key,
    keep_listed_files,
    listed_hashes,
    make_lock,
)
from modelops.errors import RequestError, ResolutionError

PYTHON = Interpreter(
    "/usr/bin/python3.12", "3.12.1", "cpython", "linux-x86_64", "2.36", "cpython-312", "/usr"
)
WHEEL, SDIST, OTHER = "a" * 64, "b" * 64, "c" * 64
PYLOCK = f"""lock-version = "1.0"
created-by = "uv"
requires-python = ">=3.12"

[[packages]]
name = "six"
version = "1.17.0"
sdist = {{ url = "https://x/six.tgz", upload-time = 2024-12-04T17:35:28Z, hashes = {{ sha256 = "{SDIST}" }} }}
wheels = [{{ url = "https://x/six.whl", size = 1, hashes = {{ sha256 = "{WHEEL}" }} }}]
"""


def test_a_lock_can_be_read_back_from_its_text_alone() -> None:
    lock = make_lock(PYLOCK, PYTHON, bundle_digest="d" * 64, install=True)

    assert parse_lock(lock.text) == lock
    assert (lock.python_version, lock.implementation, lock.platform) == ("3.12", "cpython", "linux-x86_64")
    assert (lock.glibc, lock.bundle_digest, lock.install) == ("2.36", "d" * 64, True)
    assert pickle.loads(pickle.dumps(lock)) == lock
    assert len(lock.digest) == 64


def test_a_jobs_lock_can_become_a_bundles_pylock() -> None:
    lock = make_lock(PYLOCK, PYTHON, bundle_digest="d" * 64, install=True)

    assert make_lock(lock.text, PYTHON) == make_lock(PYLOCK, PYTHON)
    assert make_lock(lock.text + "[tool.other]\nx = 1\n", PYTHON).document["tool"]["other"] == {"x": 1}


def test_a_lock_that_was_cut_or_changed_anywhere_is_refused() -> None:
    text = make_lock(PYLOCK, PYTHON, bundle_digest="d" * 64, install=True).text
    for at in range(len(text)):
        with pytest.raises(RequestError, match="no lock"):
            parse_lock(text[:at])
    with pytest.raises(RequestError, match="no lock"):
        parse_lock(text.replace("1.17.0", "1.16.0"))


@pytest.mark.parametrize("text", ["", "not toml =", PYLOCK, "[tool.modelops]\nformat = 1\n"])
def test_what_is_no_lock_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="no lock"):
        parse_lock(text)


def test_a_lock_of_a_newer_modelops_is_refused_with_a_sentence() -> None:
    with pytest.raises(RequestError, match=r"newer ModelOps.*upgrade"):
        parse_lock(make_lock(PYLOCK, PYTHON).text.replace("format = 2", "format = 3"))


def test_the_key_leaves_out_comments() -> None:
    lock = make_lock(PYLOCK, PYTHON)

    assert environment_key(make_lock("# a comment\n" + PYLOCK, PYTHON), PYTHON) == environment_key(
        lock, PYTHON
    )


def test_the_key_differs_by_everything_that_matters() -> None:
    lock = make_lock(PYLOCK, PYTHON)
    keys = {
        environment_key(lock, PYTHON),
        environment_key(make_lock(PYLOCK.replace("1.17.0", "1.16.0"), PYTHON), PYTHON),
        environment_key(make_lock(EMPTY, PYTHON), PYTHON),
        environment_key(make_lock(PYLOCK, PYTHON, bundle_digest="d"), PYTHON),
        environment_key(make_lock(PYLOCK, PYTHON, bundle_digest="d", install=True), PYTHON),
        *(
            environment_key(lock, msgspec.structs.replace(PYTHON, **{field: "3.12.2"}))
            for field in ("version", "implementation", "platform", "abi", "executable", "mark")
        ),
    }

    assert len(keys) == 11
    assert all("/" not in key and key.isprintable() for key in keys)


def test_listed_hashes_are_read_over_continued_lines() -> None:
    text = (
        f"Six_X==1 \\\n  --hash=sha256:{WHEEL} \\\n  --hash=sha256:{SDIST.upper()}\n"
        "idna  # --hash\n-r other.txt\n"
    )

    assert listed_hashes(text) == {"six-x": {WHEEL, SDIST}}


def test_files_without_a_listed_hash_leave_the_lock() -> None:
    (package,) = tomllib.loads(keep_listed_files(PYLOCK, {"six": {WHEEL}}))["packages"]
    assert "sdist" not in package
    assert len(package["wheels"]) == 1

    (package,) = tomllib.loads(keep_listed_files(PYLOCK, {"six": {SDIST, OTHER}}))["packages"]
    assert "wheels" not in package
    assert package["sdist"]["upload-time"].year == 2024


def test_a_lock_whose_files_are_all_listed_keeps_its_meaning() -> None:
    assert tomllib.loads(keep_listed_files(PYLOCK, {"six": {WHEEL, SDIST}})) == tomllib.loads(PYLOCK)


def test_hashes_that_do_not_match_are_refused() -> None:
    check_hashes("requirements.txt", PYLOCK, {"six": {WHEEL}}, required=True)
    check_hashes("requirements.txt", PYLOCK, {}, required=False)
    with pytest.raises(ResolutionError, match=r"hash mismatch for six==1\.17\.0"):
        check_hashes("requirements.txt", PYLOCK, {"six": {OTHER}}, required=True)
    with pytest.raises(ResolutionError, match="none for six"):
        check_hashes("requirements.txt", PYLOCK, {"idna": {WHEEL}}, required=True)


_words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | _words
    | st.datetimes(timezones=st.just(datetime.UTC)).map(lambda d: d.replace(year=max(d.year, 1000))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(value=_values)
def test_values_survive_being_written_as_toml(value: object) -> None:
    assert tomllib.loads(f"x = {_toml(value)}")["x"] == value


def info(name: str, used_at: float, n_bytes: int, *, damaged: bool = False) -> EnvironmentInfo:
    from pathlib import Path

    from modelops.environments import Damage, EnvironmentKey

    damages = (Damage("x", "is missing"),) if damaged else ()
    return EnvironmentInfo(EnvironmentKey(name), Path(name), "", (), n_bytes, 0.0, used_at, False, damages)


@given(
    sizes=st.lists(st.integers(0, 100), max_size=8),
    limit=st.integers(0, 300),
)
def test_what_a_size_limit_leaves_fits_and_is_younger_than_what_would_still_fit(
    sizes: list[int], limit: int
) -> None:
    found = [info(str(n), float(n), size) for n, size in enumerate(sizes)]
    gone = choose(found, now=1e9, max_age_s=None, max_bytes=limit, everything=False)
    kept = [i for i in found if i not in gone]

    assert sum(i.n_bytes for i in kept) <= limit
    for removed in gone:
        younger = sum(i.n_bytes for i in kept if i.used_at > removed.used_at)
        assert younger + removed.n_bytes > limit


def test_damaged_folders_always_go_and_nothing_else_without_a_limit() -> None:
    found = [info("whole", 1.0, 10), info("damaged", 2.0, 10, damaged=True)]

    chosen = choose(found, now=1e9, max_age_s=None, max_bytes=None, everything=False)
    assert [i.key for i in chosen] == ["damaged"]
    assert choose(found, now=1e9, max_age_s=None, max_bytes=None, everything=True) == found
