"""A digest is the same on every machine, and different for every difference that matters."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelops.bundles.digest import EXECUTABLE, FILE, Entry, digest_of, is_digest
from modelops.bundles.files import bundle_digest, find_files
from modelops.errors import BundleError, NotFoundError

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "bundle.md"


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    write(folder / "pyproject.toml", "[tool.modelops]\n")
    write(folder / "src" / "model.py", "def simulate(params, seed): return {}\n")
    return folder


def test_the_test_vector_of_the_reference_holds(tmp_path: Path) -> None:
    write(tmp_path / "model.py", "def simulate(params, seed):\n    return {}\n")
    write(tmp_path / "data" / "é.csv", "a\n1\n")
    write(tmp_path / "run.sh", "#!/bin/sh\n").chmod(0o755)
    (tmp_path / "latest.csv").symlink_to("data/é.csv")
    documented = re.findall(r"\b[0-9a-f]{64}\b", REFERENCE.read_text("utf-8"))
    assert documented, "the reference has no test vector"
    assert bundle_digest(tmp_path) == documented[-1]


def test_the_layout_is_header_then_mode_hash_path_nul() -> None:
    sha = hashlib.sha256(b"").hexdigest()
    written = b"modelops.bundle.1\n" + f"100644 {sha} a\0".encode() + f"100755 {sha} b\0".encode()
    assert (
        digest_of([Entry("b", EXECUTABLE, sha), Entry("a", FILE, sha)]) == hashlib.sha256(written).hexdigest()
    )


entries = st.builds(
    Entry,
    path=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
    mode=st.sampled_from([FILE, EXECUTABLE]),
    sha256=st.binary(max_size=4).map(lambda b: hashlib.sha256(b).hexdigest()),
)


@given(st.lists(entries, unique_by=lambda e: e.path), st.randoms())
def test_order_does_not_matter_and_every_difference_does(found: list[Entry], random: object) -> None:
    digest = digest_of(found)
    assert is_digest(digest)
    assert digest_of(reversed(found)) == digest
    for i in range(len(found)):
        assert digest_of(found[:i] + found[i + 1 :]) != digest


def test_times_owners_and_other_mode_bits_do_not_matter(bundle: Path) -> None:
    before = bundle_digest(bundle)
    os.utime(bundle / "pyproject.toml", (1, 1))
    (bundle / "pyproject.toml").chmod(0o600)
    (bundle / "an empty folder").mkdir()
    assert bundle_digest(bundle) == before


def test_content_name_and_executable_bit_matter(bundle: Path) -> None:
    seen = {bundle_digest(bundle)}
    (bundle / "pyproject.toml").chmod(0o744)
    seen.add(bundle_digest(bundle))
    write(bundle / "src" / "model.py", "def simulate(params, seed): return {1: 1}\n")
    seen.add(bundle_digest(bundle))
    (bundle / "src" / "model.py").rename(bundle / "src" / "modle.py")
    seen.add(bundle_digest(bundle))
    assert len(seen) == 4


def test_what_tools_leave_behind_does_not_matter(bundle: Path) -> None:
    before = bundle_digest(bundle)
    for path in (
        ".git/HEAD",
        "src/__pycache__/model.cpython-311.pyc",
        ".venv/bin/python",
        ".mypy_cache/x",
        "results/replicates.parquet",
        "src/b.egg-info/PKG-INFO",
        ".DS_Store",
    ):
        write(bundle / path)
    assert bundle_digest(bundle) == before


def test_the_ignore_file_has_gitignore_syntax_and_the_last_word(bundle: Path) -> None:
    write(bundle / ".modelopsignore", "# big\n*.csv\n!keep.csv\n/only_here.txt\n!/results/\n")
    for path in (
        "a.csv",
        "deep/b.csv",
        "keep.csv",
        "only_here.txt",
        "deep/only_here.txt",
        "results/table.txt",
    ):
        write(bundle / path)
    assert [f.path for f in find_files(bundle)] == [
        ".modelopsignore",
        "deep/only_here.txt",
        "keep.csv",
        "pyproject.toml",
        "results/table.txt",
        "src/model.py",
    ]


def test_a_single_file_has_the_digest_of_a_folder_with_that_file(tmp_path: Path) -> None:
    script = write(tmp_path / "coin" / "coin.py")
    assert bundle_digest(script) == bundle_digest(tmp_path / "coin")


LINKS = [
    # target                 what the author is told
    ("/etc/hostname", "a link to .*, outside the bundle"),
    ("../secret", "a link to .*, outside the bundle"),
    ("src/../../secret", "a link to .*, outside the bundle"),
    ("nothing.py", "a link to .*, which is missing or ignored"),
    (".git/HEAD", "a link to .*, which is missing or ignored"),
    ("chain", "a link to another link"),
    ("folder/model.py", "a link to another link"),
]


@pytest.mark.parametrize(("target", "says"), LINKS, ids=[link[0] for link in LINKS])
def test_a_link_that_cannot_travel_is_refused_by_name(bundle: Path, target: str, says: str) -> None:
    write(bundle.parent / "secret")
    write(bundle / ".git" / "HEAD")
    (bundle / "chain").symlink_to("pyproject.toml")
    (bundle / "folder").symlink_to("src")
    (bundle / "link").symlink_to(target)
    with pytest.raises(BundleError, match=f"link is {says}"):
        find_files(bundle)


def test_links_inside_are_kept_and_their_targets_matter(bundle: Path) -> None:
    (bundle / "m.py").symlink_to("src/model.py")
    first = bundle_digest(bundle)
    (bundle / "m.py").unlink()
    (bundle / "m.py").symlink_to("pyproject.toml")
    assert bundle_digest(bundle) != first


def test_sockets_pipes_and_names_that_are_no_text_are_refused(bundle: Path) -> None:
    os.mkfifo(bundle / "pipe")
    with pytest.raises(BundleError, match="pipe is neither a file nor a folder"):
        find_files(bundle)
    (bundle / "pipe").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        cwd = Path.cwd()
        os.chdir(bundle)  # a socket's address is at most 107 bytes
        try:
            server.bind("s")
        finally:
            os.chdir(cwd)
        with pytest.raises(BundleError, match="neither a file nor a folder"):
            find_files(bundle)
    (bundle / "s").unlink()
    Path(os.fsdecode(os.fsencode(bundle) + b"/\xff.py")).touch()
    with pytest.raises(BundleError, match=r"\\xff\.py is not valid UTF-8; rename .*, or list it in"):
        find_files(bundle)
    (bundle / ".modelopsignore").write_text("?.py\n")
    assert os.fsdecode(b"\xff.py") not in [found.path for found in find_files(bundle)]
    (bundle / "link").symlink_to(os.fsdecode(b"\xff.py"))
    with pytest.raises(BundleError, match=r"\\xff\.py is not valid UTF-8; point the link .*link at"):
        find_files(bundle)
    with pytest.raises(BundleError, match=r"caf\\xe9\.py is not valid UTF-8; rename"):
        find_files(_file(os.fsdecode(os.fsencode(bundle.parent) + b"/caf\xe9.py")))


def _file(name: str) -> Path:
    Path(name).touch()
    return Path(name)


def test_a_bundle_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        find_files(tmp_path / "nowhere")
