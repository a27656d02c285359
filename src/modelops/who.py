"""Who does something, for the record."""

from __future__ import annotations

import getpass
import os
import socket


def whoami() -> str:
    """Return user and host."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


def this_process() -> str:
    """Return host and process id: who drives a job."""
    return f"{socket.gethostname()}:{os.getpid()}"
