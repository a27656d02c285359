"""How long until Python code may go on, and until the command says something? Goal: 0.15 s and 0.3 s.

A new process each time, with its modules compiled: `import modelops`, `modelops --help`, and beside them a Python that
does nothing, the import of Dask's client and its command. What takes long, Dask, pyarrow and SQLAlchemy, is imported
when it is needed.

Usage: python bench/importing.py [REPEATS]
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from measuring import arguments, describe, show

BIN = Path(sys.executable).parent
COMMANDS = {
    "import modelops": [sys.executable, "-c", "import modelops"],
    "modelops --help": [str(BIN / "modelops"), "--help"],
    "modelops jobs --help": [str(BIN / "modelops"), "jobs", "--help"],
    "Python that does nothing": [sys.executable, "-c", "pass"],
    "import distributed": [sys.executable, "-c", "import distributed"],
    "dask --help": [str(BIN / "dask"), "--help"],
}


def main() -> None:
    said = arguments(__doc__)
    repeats = int(said[0]) if said else 20
    took: dict[str, list[float]] = {what: [] for what in COMMANDS}
    for n in range(repeats + 1):  # in turns, and the first time only to compile what is not yet
        for what, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if n:
                took[what].append(time.perf_counter() - began)
    for what, seconds in took.items():
        show(what, seconds)
    describe("distributed", "typer")


if __name__ == "__main__":
    main()
