"""How the parent starts a runner: the command line. Imported by the parent only."""

from __future__ import annotations

from pathlib import Path

# The package is loaded by its path, under its own name. Nothing is put on sys.path, so none of its module
# names can hide one of the bundle's, and nothing else of the worker's site-packages can be imported.
_BOOT = (
    "import os, sys;"
    "sys.path[:] = filter(None, sys.path);"  # -c puts the current folder first
    "package = type(sys)('modelops_runner');"
    "package.__path__ = [sys.argv[1]];"
    "sys.modules['modelops_runner'] = package;"
    # Before all other imports, as the runner's own modules would else be compiled at each start: 40 ms of 60.
    "from modelops_runner.bytecode import keep_bytecode;"
    "keep_bytecode(os.environ.get('MODELOPS_PYCACHE'));"
    "from modelops_runner.serve import main;"
    "main()"
)


def runner_argv(python: str) -> list[str]:
    """Return the command that starts a runner in the environment of this interpreter.

    The parent chooses the variables of the runner; they must be heard (``PYTHONHASHSEED`` fixes the order of
    sets, which is part of a result), so it is not ``-I`` but ``-s`` that keeps the user's site-packages out.
    ``-B`` is what children that a model spawns inherit, so that they write no bytecode into the snapshot.
    """
    return [python, "-s", "-B", "-c", _BOOT, str(Path(__file__).resolve().parent)]
