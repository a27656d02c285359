"""What does one replicate cost on a warm runner? A no-op model that returns five floats, over a plain pipe.

Prints microseconds per replicate, seen from outside: from writing the request to reading the answer, with a
reader that does nothing but read. Usage: ``python bench/runner_overhead.py [PYTHON ...]``.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec

from measuring import arguments, describe, folder_on_disk
from modelops.rpc import Answer, Initialize, Peer, ReplicateSet, ReplicatesRun
from modelops_runner.launch import runner_argv

N = 4_000
REPEATS = 7
PAUSE_S = (
    0.001  # the reader batches: a writer that never has to wake a sleeper writes for a third of the price
)
MODEL = """
import random
OUT = {f"output_{i}": random.random() for i in range(5)}
def simulate(params, seed):
    return OUT
"""


def main() -> None:
    said = arguments(__doc__)
    for python in said or [sys.executable]:
        start, times = measure(python)
        shown = " ".join(f"{t:.2f}" for t in times)
        print(f"{python}: {start * 1e3:.0f} ms to the handshake; {min(times):.2f} us per replicate ({shown})")
    describe("msgspec")


def measure(python: str) -> tuple[float, list[float]]:
    with folder_on_disk() as folder:
        paths = {name: Path(folder, name) for name in ("snapshot", "workdir", "tmpdir", "spool")}
        for path in paths.values():
            path.mkdir()
        (paths["snapshot"] / "noop.py").write_text(MODEL)
        begin = time.perf_counter()
        with subprocess.Popen(
            runner_argv(python), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdin
            assert process.stdout
            assert process.stderr
            stderr = process.stderr.fileno()
            for pipe in (process.stdout, process.stderr):
                fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, 1 << 20)
            threading.Thread(target=drain, args=(stderr,)).start()
            peer = Peer()
            _, frame = peer.request(
                Initialize(
                    bundle_digest="", marker="0123456789abcdef", **{k: str(v) for k, v in paths.items()}
                )
            )
            ask(process, peer, frame)
            start = time.perf_counter() - begin
            sets = tuple(
                ReplicateSet(
                    params=msgspec.Raw(b'{"beta":0.3,"gamma":0.1}'),
                    param=p,
                    index=200 * p,
                    replicate=0,
                    seeds=tuple(range(200)),
                    entropy_key="00" * 16,
                )
                for p in range(N // 200)
            )
            times = []
            for _ in range(REPEATS):
                _, frame = peer.request(ReplicatesRun(entry="noop:simulate", sets=sets))
                before = time.perf_counter()
                raw = ask(process, peer, frame)
                times.append((time.perf_counter() - before) / N * 1e6)
                assert raw == N + 1
            process.stdin.close()
    return start, times


def ask(process: subprocess.Popen[bytes], peer: Peer, frame: bytes) -> int:
    """Send, and read until the answer; return the number of messages. Decoding waits until all is read."""
    assert process.stdin
    assert process.stdout
    process.stdin.write(frame)
    process.stdin.flush()
    fd, chunks = process.stdout.fileno(), []
    while chunk := os.read(fd, 1 << 20):
        time.sleep(PAUSE_S)
        chunks.append(chunk)
        if b'"result":' in chunk or b'"error":{"code"' in chunk:
            break
    messages = peer.receive(b"".join(chunks))
    assert isinstance(messages[-1], Answer)
    return len(messages)


def drain(fd: int) -> None:
    while os.read(fd, 1 << 20):
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    main()
