"""Which file of a bundle states its dependencies, and what decides a lock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from modelops.environments import dependency_inputs
from modelops.environments.inputs import script_metadata, tree_digest
from modelops.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path

PROJECT = '[project]\nname = "m"\nversion = "1"\nrequires-python = ">=3.10"\ndependencies = ["six"]\n'
SCRIPT = '# /// script\n# requires-python = ">=3.11"\n# dependencies = [\n#   "six",\n# ]\n# ///\nx = 1\n'
FILES = {
    "uv.lock": 'version = 1\n[[package]]\nname = "six"\nsource = { registry = "https://x" }\n',
    "pylock.toml": 'lock-version = "1.0"\nrequires-python = ">=3.12"\npackages = []\n',
    "requirements.txt": "six\n",
    "pyproject.toml": PROJECT,
    "model.py": SCRIPT,
}


def write(root: Path, *names: str, **more: str) -> Path:
    root.mkdir(exist_ok=True)
    for name in names:
        (root / name).write_text(FILES[name])
    for name, text in more.items():
        (root / name.replace("__", ".")).write_text(text)
    return root


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("uv.lock", "pylock.toml", "requirements.txt", "pyproject.toml", "model.py"), "uv.lock"),
        (("pylock.toml", "requirements.txt", "pyproject.toml", "model.py"), "pylock.toml"),
        (("requirements.txt", "pyproject.toml", "model.py"), "requirements.txt"),
        (("pyproject.toml", "model.py"), "project"),
        (("model.py",), "pep723"),
        ((), "none"),
    ],
)
def test_the_first_file_in_the_order_wins(names: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    assert dependency_inputs(write(tmp_path / "m", *names)).kind == kind


def test_requires_python_comes_from_the_project_the_script_or_the_lock(tmp_path: Path) -> None:
    assert dependency_inputs(write(tmp_path / "a", "pyproject.toml")).requires_python == ">=3.10"
    assert dependency_inputs(write(tmp_path / "b", "model.py")).requires_python == ">=3.11"
    assert dependency_inputs(write(tmp_path / "c", "pylock.toml")).requires_python == ">=3.12"
    assert dependency_inputs(write(tmp_path / "d", "requirements.txt")).requires_python is None


def test_a_folder_of_several_scripts_states_no_dependencies(tmp_path: Path) -> None:
    assert dependency_inputs(write(tmp_path / "m", "model.py", other__py="x = 1")).kind == "none"


@pytest.mark.parametrize(
    ("text", "pin"),
    [("3.12\n", "3.12"), ("# ours\n\n3.12.1\n", "3.12.1"), ("cpython-3.13.0-linux\n", "3.13.0"), ("", None)],
)
def test_python_version_pins(text: str, pin: str | None, tmp_path: Path) -> None:
    root = write(tmp_path / "m")
    (root / ".python-version").write_text(text)

    assert dependency_inputs(root).python_pin == pin


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pyproject.toml", "[project"),
        ("model.py", "# /// script\n# dependencies = [\n# ///\n"),
        ("model.py", SCRIPT + SCRIPT),
        (".python-version", "the new one\n"),
        ("requirements.txt", "-r missing.txt\n"),
        ("pylock.toml", "= nothing"),
    ],
)
def test_a_file_that_is_not_valid_is_named(name: str, text: str, tmp_path: Path) -> None:
    root = write(tmp_path / "m")
    (root / name).write_text(text)

    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        dependency_inputs(root)


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_digest_goes_with_the_content_and_not_with_the_place(name: str, tmp_path: Path) -> None:
    extra = ("pyproject.toml",) if name == "uv.lock" else ()
    here, there = (dependency_inputs(write(tmp_path / f, name, *extra)) for f in ("here", "there"))
    changed = write(tmp_path / "changed", name, *extra)
    (changed / name).write_text(FILES[name].replace("six", "idna").replace('"1.0"', '"1.1"'))

    assert here.digest() == there.digest()
    assert dependency_inputs(changed).digest() != here.digest()


def test_included_requirement_files_are_inputs(tmp_path: Path) -> None:
    root = write(tmp_path / "m", requirements__txt="-r base.txt\n-c limits.txt\n", base__txt="six\n")
    (root / "limits.txt").write_text("six<2\n")
    before = dependency_inputs(root)
    (root / "limits.txt").write_text("six<1.17\n")

    assert set(before.contents) == {"requirements.txt", "base.txt", "limits.txt"}
    assert dependency_inputs(root).digest() != before.digest()


def test_version_and_tools_of_the_project_are_no_inputs(tmp_path: Path) -> None:
    root = write(tmp_path / "m", "pyproject.toml")
    before = dependency_inputs(root).digest()
    (root / "pyproject.toml").write_text(PROJECT.replace('"1"', '"2"') + "[tool.modelops]\nmodel = 'a:b'\n")

    assert dependency_inputs(root).digest() == before


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("", False),
        ("[tool.modelops]\ninstall = true\n", True),
        ('[project.entry-points."modelops.wire"]\nwire = "m:wire"\n', True),
        ('[project.entry-points.g]\nx = "m:x"\n[tool.modelops]\ninstall = false\n', False),
    ],
)
def test_a_bundle_is_installed_when_it_asks_or_has_entry_points(
    extra: str, expected: bool, tmp_path: Path
) -> None:
    inputs = dependency_inputs(write(tmp_path / "m", pyproject__toml=PROJECT + extra))

    assert inputs.needs_install == inputs.needs_bundle == expected


@pytest.mark.parametrize(
    ("line", "local"),
    [
        ("./libs/x", True),
        ("-e .", True),
        ("x @ file:///srv/x", True),
        ("wheels/x-1-py3-none-any.whl", True),
        ("six", False),
        ("six==1.0  # not ./here", False),
        ("x @ https://example.org/x-1.tar.gz", False),
    ],
)
def test_paths_among_requirements_need_the_bundle(line: str, local: bool, tmp_path: Path) -> None:
    assert dependency_inputs(write(tmp_path / "m", requirements__txt=line)).needs_bundle == local


def test_paths_among_sources_and_in_locks_need_the_bundle(tmp_path: Path) -> None:
    source = PROJECT + '[tool.uv.sources]\nsix = { path = "libs/six" }\n'
    lock = (
        '[[package]]\nname = "m"\nsource = { virtual = "." }\ndependencies = [{ name = "six" }]\n'
        '[[package]]\nname = "s"\nsource = { directory = "s" }\n'
    )
    pylock = 'lock-version = "1.0"\n[[packages]]\nname = "s"\ndirectory = { path = "s" }\n'

    assert dependency_inputs(write(tmp_path / "a", pyproject__toml=source)).needs_bundle
    assert dependency_inputs(write(tmp_path / "b", pyproject__toml=PROJECT, uv__lock=lock)).needs_bundle
    assert dependency_inputs(write(tmp_path / "c", pylock__toml=pylock)).needs_bundle


def test_script_metadata_is_read_as_pep_723_says() -> None:
    assert script_metadata(SCRIPT) == {"requires-python": ">=3.11", "dependencies": ["six"]}
    assert script_metadata("#!/usr/bin/env python\n" + SCRIPT.rstrip()) is not None
    assert script_metadata("x = 1\n") is None
    with pytest.raises(ValueError, match="two"):
        script_metadata(SCRIPT + SCRIPT)


def test_the_digest_of_a_folder_leaves_out_caches(tmp_path: Path) -> None:
    root = write(tmp_path / "m", "model.py")
    before = tree_digest(root)
    (root / "__pycache__").mkdir()
    (root / "__pycache__" / "model.pyc").write_bytes(b"x")
    assert tree_digest(root) == before

    (root / "model.py").chmod(0o755)
    assert tree_digest(root) != before


LOCKED = """
[[package]]
name = "six"
version = "1.16.0"
[[package]]
name = "six"
version = "1.17.0"
[[package]]
name = "a-b"
version = "2.0rc1"
[[package]]
name = "toolz"
version = "1.0"
[[package]]
name = "m"
source = {{ {source} = "." }}
dependencies = [
    {{ name = "six" }},
    {{ name = "six", marker = "x" }},
    {{ name = "a-b", extra = ["q"] }},
    {{ name = "lib" }},
]
"""


def with_lock(root: Path, dependencies: list[str], source: str = "virtual") -> Path:
    text = f'[project]\nname = "m"\nversion = "1"\ndependencies = {dependencies}\n'
    text += '[tool.uv.sources]\nlib = { path = "vendor/lib" }\n'
    return write(root, pyproject__toml=text, uv__lock=LOCKED.format(source=source))


@pytest.mark.parametrize(
    "dependencies",
    [
        [],
        ["Six"],
        ["six==1.16", "six>=1.17,<2"],
        ["A.b[Q] ~= 2.0rc0"],
        ["nothing; python_version < '3'", "six>2; python_version < '3'"],
        ["six @ https://y/six-9.whl"],
        ["lib>=1"],
    ],
)
@pytest.mark.parametrize("source", ["virtual", "editable"])
def test_a_uv_lock_that_gives_what_the_project_asks_for_is_taken(
    dependencies: list[str], source: str, tmp_path: Path
) -> None:
    assert dependency_inputs(with_lock(tmp_path / "m", dependencies, source)).kind == "uv.lock"


@pytest.mark.parametrize(
    ("dependency", "message"),
    [
        ("six==1.18", r"six==1.18 \(the lock has 1.16.0, 1.17.0\); make it anew: uv lock"),
        ("numpy", r"numpy \(it is not in the lock\)"),
        ("toolz", r"toolz \(it is not in the lock\)"),  # it is there, but not for the project
        ("a-b[other]", r"a-b\[other\] \(it is not in the lock\)"),
        ("a-b<2", r"a-b<2 \(the lock has 2.0rc1\)"),
    ],
)
def test_a_uv_lock_that_does_not_give_what_the_project_asks_for_is_refused(
    dependency: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=message):
        dependency_inputs(with_lock(tmp_path / "m", ["six", dependency]))
