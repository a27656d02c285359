"""What a bundle's text says about its entry points: only what it rules out is refused."""

from __future__ import annotations

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

import modelops as mo
from modelops.bundles.entries import what_is_missing
from modelops.bundles.script import top_level_functions
from modelops.client.submission import prepared
from modelops.errors import RequestError
from modelops.home import Home

if TYPE_CHECKING:
    from pathlib import Path

BINDS_RUN = {
    "a function": "def run(seed): ...",
    "a class": "class run:\n    def __call__(self): ...",
    "a coroutine": "async def run(): ...",
    "a value": "run = print",
    "a tuple": "a, (run, *b) = 1, (2, 3)",
    "an annotated value": "run: object = print",
    "an import": "import os.path as run",
    "an imported package": "import run.inner",
    "an import from": "from os import getcwd as run",
    "an import of everything": "from os import *",
    "a branch": "try:\n    import x\nexcept ImportError:\n    def run(): ...",
    "a decorated function in a branch": "if True:\n    @print\n    def run(): ...",
    "a loop": "for run in (): ...",
    "a with": "with open('x') as run: ...",
    "a walrus": "print(run := 1)",
    "a pattern": "match 1:\n    case {**run}: ...",
    "a global": "def f():\n    global run\n    run = 1\nf()",
    "globals()": "globals()['r' + 'un'] = print",
    "setattr": "import sys\nsetattr(sys.modules[__name__], 'run', 1)",
    "__getattr__": "def __getattr__(name): ...",
    "what this Python cannot read": "def (:",
    "a byte order mark": "\ufeffdef run(): ...",
}
LACKS_RUN = {
    "nothing": "",
    "another function": "def ran(): ...",
    "a method": "class Model:\n    def run(self): ...",
    "a function inside": "def outer():\n    def run(): ...\n    return run",
    "a local": "def outer():\n    run = 1",
    "a comment": "# def run(): ...",
    "a text": 'TEXT = """\n    def run(): ...\n"""',
    "a use": "print(run)",
}


@pytest.mark.parametrize("text", BINDS_RUN.values(), ids=BINDS_RUN)
def test_a_name_that_the_module_may_bind_is_accepted(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.py").write_text(text)
    assert what_is_missing(tmp_path, "model:run", alone=lambda: True) is None


@pytest.mark.parametrize("text", LACKS_RUN.values(), ids=LACKS_RUN)
def test_a_name_that_the_module_never_binds_is_missing(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.py").write_text(text)
    assert "model.py has no 'run'" in (what_is_missing(tmp_path, "model:run", alone=lambda: False) or "")


def test_a_module_is_looked_for_in_the_bundle_and_in_its_src(tmp_path: Path) -> None:
    for folder in (tmp_path / "inside", tmp_path / "src" / "below" / "deep"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("run = 1")
    assert what_is_missing(tmp_path, "inside:run", alone=lambda: True) is None
    assert what_is_missing(tmp_path, "below.deep:run", alone=lambda: True) is None
    assert "deep/__init__.py has no 'ran'" in (
        what_is_missing(tmp_path, "below.deep:ran", alone=lambda: True) or ""
    )


def test_only_a_bundle_without_dependencies_is_told_that_a_module_is_missing(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("def run(): ...")
    said = what_is_missing(tmp_path, "modle:run", alone=lambda: True)
    assert "no module 'modle', and no dependencies that could bring it; did you mean 'model'?" in (said or "")
    assert what_is_missing(tmp_path, "modle:run", alone=lambda: False) is None
    assert what_is_missing(tmp_path, "random:random", alone=lambda: True) is None


@pytest.mark.parametrize("key", ["model", "aggregate"])
def test_a_study_that_names_what_the_bundle_lacks_is_refused_before_a_server_is_asked(
    tmp_path: Path, key: str
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "model.py").write_text("def run(params, seed):\n    return {'x': seed}\n")
    (bundle / "pyproject.toml").write_text('[tool.modelops]\nname = "b"\nmodel = "model:run"\n')
    wrong: dict[str, Any] = {key: "model:rnu"}
    study = mo.Study(bundle=bundle, parameters=[{}], replicates=1, **wrong)
    home = Home.at(tmp_path / "home")
    with pytest.raises(RequestError, match=r"model\.py has no 'rnu'; did you mean 'run'\?.*pyproject\.toml"):
        prepared(study, home, source=lambda: pytest.fail("a server was asked"))


def test_many_threads_read_sources_while_garbage_is_collected(request: pytest.FixtureRequest) -> None:
    """Python 3.11 mixes up their depths, when what a collection calls (Dask does) lets another thread in."""

    def let_others_in(_phase: str, _info: Any) -> None:
        sum(range(100))

    source = "def f(x):\n    if x:\n        return [{'a': (x + 1) * 2, 'b': [x for x in range(9)]}]\n" * 20
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.callbacks.append(let_others_in)
    request.addfinalizer(lambda: gc.callbacks.remove(let_others_in))
    request.addfinalizer(lambda: gc.set_threshold(*threshold))
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    gc.set_threshold(50)
    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: top_level_functions(source, "model.py"), range(200)))
    assert found == [["f"] * 20] * 200
