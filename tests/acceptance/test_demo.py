"""What a stranger does first: clone the repository, type ``make demo``, look at the picture, run it again."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = "bundles/boarding_school_flu"
DEADLINE_S = 1500.0  # it downloads and installs two environments
# How this machine reaches a package index; all else that a developer's shell has is left behind.
REACHING_THE_INDEX = re.compile(
    r"SSL_CERT_\w+|(https?|all|no)_proxy|PIP_(INDEX_URL|EXTRA_INDEX_URL|FIND_LINKS|CERT|TRUSTED_HOST|CONFIG_FILE)"
    r"|UV_(INDEX|INDEX_URL|DEFAULT_INDEX|EXTRA_INDEX_URL|FIND_LINKS|CONFIG_FILE|SYSTEM_CERTS|INSECURE_HOST)",
    re.IGNORECASE,
)

pytestmark = pytest.mark.timeout(2 * DEADLINE_S)


@dataclass(frozen=True)
class Demo:
    """A clone in which ``make demo`` ran."""

    clone: Path
    environ: dict[str, str]
    said: str

    @property
    def results(self) -> Path:
        return self.clone / "results" / "boarding-school-flu"

    def modelops(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.clone / ".venv" / "bin" / "modelops", *arguments],
            cwd=self.clone, env=self.environ, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip

    def environments(self) -> list[dict[str, Any]]:
        return list(json.loads(self.modelops("env", "list", "--json").stdout)["environments"])


def copy_of_the_repository(to: Path) -> None:
    """Clone what is committed; where git or its folder is missing (an unpacked archive), copy what is there."""
    if shutil.which("git") and (ROOT / ".git").exists():
        allow = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
        command = ["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(to)]
        subprocess.run(command, env={**os.environ, **allow}, check=True)
    else:
        left_out = shutil.ignore_patterns(
            ".venv", "results", "*_cache", "__pycache__", ".hypothesis", "uv.lock"
        )
        shutil.copytree(ROOT, to, ignore=left_out, symlinks=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """Run ``make demo`` in a fresh clone, in an environment with nothing but a PATH and an empty home."""
    folder = tmp_path_factory.mktemp("stranger")
    clone, home = folder / "modelops", folder / "home"
    home.mkdir()
    copy_of_the_repository(clone)
    environ = {name: value for name, value in os.environ.items() if REACHING_THE_INDEX.fullmatch(name)}
    environ |= {"PATH": os.environ["PATH"], "HOME": str(home), "MODELOPS_HOME": str(home / "modelops")}
    own = Path.home() / ".config" / "pip" / "pip.conf"
    if own.is_file():
        environ.setdefault("PIP_CONFIG_FILE", str(own))
    done = subprocess.run(
        ["make", "demo"], cwd=clone, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    made = Demo(clone, environ, done.stdout)
    yield made
    assert made.modelops("down").returncode == 0


def test_make_demo_in_a_fresh_clone_runs_every_replicate_and_writes_the_result_files(demo: Demo) -> None:
    assert "4,000 succeeded" in demo.said
    replicates = pq.read_table(demo.results / "replicates.parquet")
    assert replicates.num_rows == 20 * 200
    assert set(replicates["status"].to_pylist()) == {"succeeded"}
    assert pq.read_table(demo.results / "aggregates.parquet").num_rows == 20


def test_the_best_fit_beats_the_mean_predictor_and_its_band_covers_the_days(demo: Demo) -> None:
    loss = re.search(r"loss \(.*\): ([\d.]+); always predicting the observed mean: ([\d.]+)", demo.said)
    days = re.search(r"in the 95% band: (\d+) of 14", demo.said)
    assert loss is not None, demo.said
    assert days is not None, demo.said
    assert float(loss[1]) < float(loss[2])
    assert int(days[1]) >= 11


def test_the_picture_is_a_picture(demo: Demo) -> None:
    (picture,) = demo.results.glob("*.png")
    assert picture.name in demo.said
    width, height, rows = read_png(picture.read_bytes())
    assert width >= 600
    assert height >= 300
    assert len(set(rows)) > 50, "lines and bands: many rows of pixels that differ"


def test_a_second_run_builds_nothing_and_gives_the_same_files_byte_for_byte(demo: Demo) -> None:
    (before,) = demo.environments()

    again = demo.modelops("run", BUNDLE, "--out", "again")

    assert again.returncode == 0, again.stderr
    assert "resolving" not in again.stderr
    assert "installing" not in again.stderr
    (after,) = demo.environments()
    assert (after["key"], after["built_at"]) == (before["key"], before["built_at"])
    assert after["damages"] == []
    for name in ("replicates.parquet", "aggregates.parquet"):
        assert (demo.clone / "again" / name).read_bytes() == (demo.results / name).read_bytes(), name


def test_the_clone_is_clean_after_the_demo(demo: Demo) -> None:
    if not (demo.clone / ".git").exists():
        pytest.skip("the repository is no git repository here")
    status = ["git", "-C", str(demo.clone), "status", "--porcelain", "--", ".", ":!again"]
    assert subprocess.run(status, capture_output=True, text=True, check=True).stdout == ""


def read_png(data: bytes) -> tuple[int, int, list[bytes]]:
    """Return width, height and the rows of pixels (as filtered), checking every checksum on the way."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, pixels, kind, size = 8, b"", b"", (0, 0, 0, 0)
    while kind != b"IEND":
        (n,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + n]
        assert struct.unpack_from(">I", data, at + 8 + n)[0] == zlib.crc32(kind + body)
        if kind == b"IHDR":
            size = struct.unpack_from(">IIBB", body)
        elif kind == b"IDAT":
            pixels += body
        at += 12 + n
    width, height, depth, colours = size
    assert depth == 8
    raw = zlib.decompress(pixels)
    stride = width * {0: 1, 2: 3, 4: 2, 6: 4}[colours] + 1
    assert len(raw) == stride * height
    return width, height, [raw[y * stride : (y + 1) * stride] for y in range(height)]
