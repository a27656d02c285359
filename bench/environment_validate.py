"""How long does it take to see that an environment of 5,000 files is whole? Goal: at most 20 ms.

Builds one without dependencies, adds files that count as installed, and validates it by stats.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from modelops.environments import Environments
from modelops.environments.manifest import read_manifest, survey, write_manifest

N_FILES, N_FOLDERS, REPEATS = 5_000, 400, 20


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        environments = Environments(Path(folder) / "cache")
        bundle = Path(folder) / "bundle"
        bundle.mkdir()
        environment = environments.ensure(environments.resolve(bundle))
        site = next(environment.path.glob("lib/python3*/site-packages"))
        for n in range(N_FILES):
            package = site / f"package{n % N_FOLDERS // 20}" / f"part{n % N_FOLDERS}"
            package.mkdir(parents=True, exist_ok=True)
            (package / f"module{n}.py").write_text("x = 1\n")
        manifest = read_manifest(environment.path)
        assert manifest is not None
        found = survey(environment.path, freeze=True)
        write_manifest(environment.path, msgspec.structs.replace(manifest, folders=found.folders))
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            damages = environments.validate(environment.key)
            seconds.append(time.perf_counter() - started)
            assert damages == []
        milliseconds = [s * 1e3 for s in seconds]
        print(f"{sum(len(f.names) for f in found.folders)} files in {len(found.folders)} folders")
        print(f"validate: median {statistics.median(milliseconds):.1f} ms, best {min(milliseconds):.1f} ms")
        print("every repeat, ms:", " ".join(f"{m:.1f}" for m in milliseconds))
        print(f"Python {sys.version.split()[0]}, {platform.machine()}, {os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()
