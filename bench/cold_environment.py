"""What do validation, repair and the manifest cost a cold build? Goal: at most 1.2 times uv by hand.

Builds the same lock by hand (`uv venv` + `uv pip sync`) and through `Environments.ensure`, alternating,
from a warm uv cache. Give requirements as arguments; default: numpy pandas pyarrow.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from measuring import arguments, describe, folder_on_disk, show
from modelops.environments import Environments
from modelops.environments.uv import find_uv, uv_environ

REPEATS = 8


def main() -> None:
    said = arguments(__doc__)
    requirements = said or ["numpy", "pandas", "pyarrow"]
    uv, environ = find_uv(), uv_environ(os.environ)
    with folder_on_disk() as folder:
        root = Path(folder)
        bundle = root / "bundle"
        bundle.mkdir()
        (bundle / "requirements.txt").write_text("\n".join(requirements) + "\n")
        cache = Environments(root / "cache")
        lock = cache.resolve(bundle)
        interpreter = cache.interpreter_for(lock)
        pylock = root / "pylock.toml"
        pylock.write_text(lock.text)
        cache.ensure(lock)  # fills uv's cache
        by_hand, ours = [], []
        for n in range(REPEATS):
            started = time.perf_counter()
            target = root / f"by-hand-{n}"
            venv = [uv, "venv", "-q", "--no-project", "--python", interpreter.executable, target]
            sync = [uv, "pip", "sync", "-q", "--python", target / "bin" / "python", pylock]
            for command in (venv, sync):
                subprocess.run(command, env=environ, check=True, cwd=root)
            by_hand.append(time.perf_counter() - started)

            fresh = Environments(root / f"cache-{n}")
            fresh.interpreters.all()  # once per machine, not once per build
            started = time.perf_counter()
            assert fresh.ensure(lock).built
            ours.append(time.perf_counter() - started)
    theirs = show("uv venv + uv pip sync by hand", by_hand)
    us = show("Environments.ensure", ours)
    print(f"ratio of the medians: {us / theirs:.2f} (goal: at most 1.2)")
    describe("uv")


if __name__ == "__main__":
    main()
