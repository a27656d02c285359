"""What `modelops bundle init` writes."""

from __future__ import annotations

import ast
import tomllib
from typing import TYPE_CHECKING

import pytest

from modelops.bundles import load_manifest
from modelops.bundles.template import init_bundle
from modelops.client.study_files import completed
from modelops.errors import RequestError
from modelops.study.study import Study

if TYPE_CHECKING:
    from pathlib import Path


NAMES = ["mymodel", "my-model", "My_Model2", "random", "numpy", "class", "wire", "test", "modelops-runner"]


@pytest.mark.parametrize("name", NAMES)
def test_a_new_bundle_is_a_bundle_whatever_its_name(tmp_path: Path, name: str) -> None:
    written = init_bundle(tmp_path / name)
    assert all(path.is_file() for path in written)
    manifest = load_manifest(tmp_path / name)
    module = manifest.model().split(":")[0]
    assert module not in ("random", "numpy", "class", "wire", "test", "modelops_runner")
    assert manifest.wire is None
    functions = ast.parse((tmp_path / name / f"{module}.py").read_text()).body
    assert {"simulate", "summarize"} <= {f.name for f in functions if isinstance(f, ast.FunctionDef)}
    assert manifest.aggregates == {"summarize": f"{module}:summarize"}
    study = completed(Study(bundle=tmp_path / name), manifest, tmp_path / name)
    assert (len(study.sets()), study.n_replicates) == (6, 100)
    assert "@" not in "".join(path.read_text() for path in written)
    assert tomllib.loads((tmp_path / name / "pyproject.toml").read_text())["project"]["name"] == (
        name.lower().replace("_", "-")
    )


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    init_bundle(tmp_path / "b")  # an empty folder will do
    before = {path: path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file()}
    with pytest.raises(RequestError, match="exists and is not empty; nothing was written"):
        init_bundle(tmp_path / "b")
    assert {path: path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file()} == before
    (tmp_path / "f").touch()
    with pytest.raises(RequestError, match="exists and is not empty"):
        init_bundle(tmp_path / "f")


@pytest.mark.parametrize("name", ["1model", "my model", "-x", "é", "a.b", "a_", "a-", "a\n"])
def test_a_name_that_cannot_be_one_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="cannot name a bundle"):
        init_bundle(tmp_path / "x", name)
    assert not (tmp_path / "x").exists()
