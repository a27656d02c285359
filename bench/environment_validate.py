"""How long does it take to see that an environment of 5,000 files is whole? Goal: at most 20 ms.

Builds one without dependencies, adds files that count as installed, and validates it by stats.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import msgspec

from measuring import arguments, describe, folder_on_disk
from modelops.environments import Environments
from modelops.environments.manifest import read_manifest, survey, write_manifest

N_FILES, N_FOLDERS, REPEATS = 5_000, 400, 20


def main() -> None:
    arguments(__doc__)
    with folder_on_disk() as folder:
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
        files = [f"{environment.path}/{f.path}/{name}" for f in found.folders for name in f.names]
        ours, theirs = [], []
        for _ in range(REPEATS):
            started = time.thread_time()
            damages = environments.validate(environment.key)
            ours.append((time.thread_time() - started) * 1e3)
            assert damages == []
            started = time.thread_time()
            for file in files:
                os.stat(file)  # noqa: PTH116  a string, thousands of times
            theirs.append((time.thread_time() - started) * 1e3)
        print(f"{len(files)} files in {len(found.folders)} folders; milliseconds of CPU")
        for what, measured in (("validate", ours), ("os.stat of each path, nothing compared", theirs)):
            median, best = statistics.median(measured), min(measured)
            print(f"{what}: median {median:.1f}, best {best:.1f} ({' '.join(f'{m:.1f}' for m in measured)})")
        describe("msgspec")


if __name__ == "__main__":
    main()
