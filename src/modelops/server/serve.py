"""The server process: HTTP at once, the rest beside it."""

from __future__ import annotations

import logging
import os
import socket
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from starlette.requests import Request

    from modelops.cluster.run_folder import RunFolder
    from modelops.home import Home
    from modelops.settings import Settings

log = logging.getLogger(__name__)


def serve_kept(settings: Settings, home: Home, run: RunFolder, *, fd: int) -> int:
    """Be the server of a pool on this machine, on the socket that its keeper holds."""
    listener = socket.socket(fileno=fd)
    port = listener.getsockname()[1]
    run.write(
        "server.json",
        {"url": f"http://127.0.0.1:{port}", "pid": os.getpid(), "version": version("modelops"), "kept": True},
    )
    config = uvicorn.Config(_app(), log_config=None, access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def _app() -> Starlette:
    async def health(request: Request) -> Any:
        return JSONResponse({"status": "ok"})

    return Starlette(routes=[Route("/health", health)])
