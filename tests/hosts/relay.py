"""A cable between a host and the others that takes its time and loses packets: ``relay.py NAMESPACE ADDRESS BRIDGE``.

For kernels that cannot do so themselves. One end is ``eth0`` in the host's namespace, the other one is in a bridge;
this program carries each frame from one to the other. A line on its stdin says how from then on: ``DELAY_S LOSS``, with
a loss of 1 nothing arrives at all.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 2, 0x1000
AT_ONCE = 64  # frames from one side, before the other has its turn


def tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    return fd


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def lay(namespace: str, address: str, bridge: str) -> tuple[int, int]:
    """Make both ends and return them: that of the host, and that of the bridge."""
    names = [f"{side}{os.getpid()}" for side in ("hx", "bx")]
    inside, outside = map(tap, names)
    ip("link", "set", names[0], "netns", namespace, "name", "eth0")
    ip("-n", namespace, "addr", "add", address, "dev", "eth0")
    ip("-n", namespace, "link", "set", "eth0", "up")
    ip("link", "set", names[1], "master", bridge, "up")
    return inside, outside


def main() -> None:
    ends = lay(*sys.argv[1:])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    delay, loss, n = 0.0, 0.0, 0
    under_way: list[tuple[float, int, int, bytes]] = []
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select([0, *ends], [], [], wait)
        if 0 in ready:
            line = os.read(0, 4096).split()
            if not line:
                return
            delay, loss = map(float, line[-2:])
        now = time.monotonic()
        for side, fd in enumerate(ends):
            for _ in range(AT_ONCE if fd in ready else 0):
                try:
                    frame = os.read(fd, 65_536)
                except BlockingIOError:
                    break
                if random.random() >= loss:
                    n += 1
                    heapq.heappush(under_way, (now + delay, n, 1 - side, frame))
        now = time.monotonic()
        while under_way and under_way[0][0] <= now:
            _, _, side, frame = heapq.heappop(under_way)
            try:
                os.write(ends[side], frame)
            except OSError:
                continue  # its end is down, or full: a packet is lost


if __name__ == "__main__":
    main()
