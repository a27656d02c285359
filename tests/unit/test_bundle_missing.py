"""The line that brings a missing module, and the file it belongs into."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from modelops.bundles.missing import line_to_add
from modelops.environments import dependency_inputs

if TYPE_CHECKING:
    from pathlib import Path

PROJECT = "[project]\nname = 'b'\nversion = '1'\n"
SCRIPT = "# /// script\n# dependencies = []\n# ///\n"
BUNDLES: list[tuple[dict[str, str], str]] = [
    ({"pyproject.toml": PROJECT}, 'add "pyyaml" to dependencies under [project] in pyproject.toml'),
    (
        {"pyproject.toml": f"{PROJECT}dependencies = ['six']\n"},
        'add "pyyaml" to dependencies under [project]',
    ),
    ({"pyproject.toml": PROJECT, "uv.lock": "version = 1\n"}, "then run: uv lock"),
    ({"pyproject.toml": PROJECT, "pylock.toml": "packages = []\n"}, "pylock.toml"),
    ({"requirements.txt": "six\n", "m.py": ""}, "add the line pyyaml to requirements.txt"),
    ({"wire.py": ""}, "add the line pyyaml to requirements.txt"),
    ({"coin.py": SCRIPT}, "to dependencies in the '# /// script' block of coin.py"),
    ({"coin.py": ""}, "to dependencies in the '# /// script' block of coin.py"),
]


@pytest.mark.parametrize(("files", "says"), BUNDLES, ids=["+".join(files) for files, _ in BUNDLES])
def test_the_line_to_add_names_the_file_that_the_bundle_has(
    tmp_path: Path, files: dict[str, str], says: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert says in line_to_add("yaml.nodes", dependency_inputs(tmp_path).listed_in)


def test_a_module_is_looked_for_under_its_own_name_where_nothing_else_is_known() -> None:
    assert '"no-such-module"' in line_to_add("no_such_module.part", "pyproject.toml")
