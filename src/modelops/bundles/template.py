"""What ``modelops bundle init NAME`` writes: a small bundle that runs, with its test and README."""

from __future__ import annotations

import keyword
import re
import sys
from typing import TYPE_CHECKING

from modelops.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

# "wire": wire.py at the root would make it a bundle of the wire convention. "test": Python's own tests.
_TAKEN = frozenset({"numpy", "test", "tests", "conftest", "pytest", "modelops", "modelops_runner", "wire"})
_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_-]*[A-Za-z0-9])?")  # as packages are named, without dots

_PYPROJECT = """\
[project]
name = "@PROJECT@"
version = "0.1.0"
description = "A stochastic SIR epidemic."
requires-python = ">=3.11"
dependencies = ["numpy>=2,<3"]

[dependency-groups]
dev = ["pytest>=8"]

[tool.modelops]
model = "@MODULE@:simulate"        # simulate(params, seed) -> dict, called once per replicate
aggregate = "@MODULE@:summarize"   # summarize(replicates) -> dict, called once per parameter set
objective = "loss"                 # the aggregate by which parameter sets are ranked, lowest first
isolation = "warm"                 # or "fork": no state passes from one replicate to the next

# What `modelops run .` runs, unless told otherwise.
[tool.modelops.study]
replicates = 100
seed = 1

[tool.modelops.study.parameters]   # every combination
beta = [0.2, 0.3, 0.4]
gamma = [0.1, 0.2]
"""

_MODEL = '''\
"""A stochastic SIR epidemic: replace it with your model."""

import numpy as np

PEOPLE = 1_000
DAYS = 100


def simulate(params: dict, seed: int) -> dict:
    """Simulate one epidemic; called once per replicate, always with another seed.

    Return a dict: numbers, text, lists, numpy arrays, tables, bytes. Take all randomness from ``seed``:
    the same seed must give the same result.
    """
    random = np.random.default_rng(seed)
    susceptible, infected = PEOPLE - 5, 5
    daily = [infected]
    for _ in range(DAYS):
        new = random.binomial(susceptible, 1 - np.exp(-params["beta"] * infected / PEOPLE))
        recovered = random.binomial(infected, 1 - np.exp(-params["gamma"]))
        susceptible -= new
        infected += new - recovered
        daily.append(infected)
    return {"infected": np.array(daily), "peak": max(daily), "attack_rate": 1 - susceptible / PEOPLE}


def summarize(replicates: list[dict]) -> dict:
    """Summarize all replicates of one parameter set: what each `simulate` returned, in order."""
    attack_rates = np.array([replicate["attack_rate"] for replicate in replicates])
    return {
        "mean_attack_rate": float(attack_rates.mean()),
        "mean_peak": float(np.mean([replicate["peak"] for replicate in replicates])),
        # How far from what you want: here, that half of the people are infected.
        "loss": abs(float(attack_rates.mean()) - 0.5),
    }
'''

_TEST = """\
import numpy as np
from @MODULE@ import simulate, summarize

PARAMS = {"beta": 0.3, "gamma": 0.1}


def test_the_same_seed_gives_the_same_epidemic():
    first, second = simulate(PARAMS, 1), simulate(PARAMS, 1)
    assert np.array_equal(first["infected"], second["infected"])


def test_seeds_give_different_epidemics():
    assert not np.array_equal(simulate(PARAMS, 1)["infected"], simulate(PARAMS, 2)["infected"])


def test_faster_transmission_infects_more():
    slow = summarize([simulate({**PARAMS, "beta": 0.1}, seed) for seed in range(20)])
    fast = summarize([simulate({**PARAMS, "beta": 0.5}, seed) for seed in range(20)])
    assert slow["mean_attack_rate"] < fast["mean_attack_rate"]
"""

_CONFTEST = """\
import sys
from pathlib import Path

# In a job the root of the bundle is on the path; here it is put there.
sys.path.insert(0, str(Path(__file__).parent.parent))
"""

_README = """\
# @PROJECT@

    modelops bundle check .                                # does it build, import, reproduce
    modelops bundle run . -p beta=0.3 -p gamma=0.1 -n 5    # five replicates, their outputs
    modelops run .                                         # the study in pyproject.toml

| file | |
|---|---|
| `@MODULE@.py` | the model and its summary |
| `pyproject.toml` | what it depends on, and the study that runs by default |
| `tests/` | run them with `uv run --no-project --with numpy,pytest pytest` |

What should not travel with the bundle goes into `.modelopsignore`, written like a `.gitignore`.
"""

_IGNORE = """\
# Files that do not belong to the bundle; written like a .gitignore. Caches and .venv are left out anyway.
tests/
README.md
"""


def init_bundle(path: Path, name: str | None = None) -> list[Path]:
    """Write a new bundle that runs.

    Parameters
    ----------
    path
        A folder that does not exist or is empty.
    name
        Of the bundle; by default that of the folder.

    Returns
    -------
        The files written.

    Raises
    ------
    RequestError
        Something is there already (nothing is overwritten), or the name cannot be one.
    """
    name = name or path.resolve().name
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"{name!r} cannot name a bundle: letters (a to z), digits, - and _, a letter first and no - or _ at "
            "the end; e.g. 'modelops bundle init mymodel'"
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RequestError(f"{path} exists and is not empty; nothing was written. Choose another name")
    module = _module_name(name)
    written = []
    for file, text in {
        "pyproject.toml": _PYPROJECT,
        f"{module}.py": _MODEL,
        "README.md": _README,
        ".modelopsignore": _IGNORE,
        "tests/conftest.py": _CONFTEST,
        f"tests/test_{module}.py": _TEST,
    }.items():
        place = path / file
        place.parent.mkdir(parents=True, exist_ok=True)
        # "x": what appeared since the look above is not overwritten either.
        with place.open("x", encoding="utf-8") as stream:
            stream.write(
                text.replace("@PROJECT@", name.replace("_", "-").lower()).replace("@MODULE@", module)
            )
        written.append(place)
    return written


def _module_name(name: str) -> str:
    module = name.replace("-", "_").lower()
    # A module named like a standard one would be imported instead of it, by every library it uses.
    taken = module in sys.stdlib_module_names or keyword.iskeyword(module) or module in _TAKEN
    return f"{module}_model" if taken else module
