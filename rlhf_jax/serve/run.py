"""Starts the server, and stops it so that running answers finish."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
from collections.abc import Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.middleware.trustedhost import TrustedHostMiddleware

from rlhf_jax.serve.app import Service, make_app
from rlhf_jax.serve.limits import Limits
from rlhf_jax.serve.metrics import Counters
from rlhf_jax.serve.models import open_models
from rlhf_jax.serve.votes import open_votes

LOGGER = logging.getLogger(__name__)
KEY_VARIABLE = "RLHF_JAX_API_KEY"


def serve(
    folders: Sequence[str],
    limits: Limits,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str = "",
    dtype: str = "float32",
    votes: str = "",
) -> None:
    """Serve models until SIGTERM or Ctrl-C; then running answers finish, and a second signal ends them.

    Args:
        folders: of models, or NAME=FOLDER; policies and reward models.
        port: 0 takes a free one.
        key: which clients must send; "": that of the environment's RLHF_JAX_API_KEY, and without it none.
        votes: the file that votes of the web page are appended to; "": they are not kept.
    Raises:
        ValueError: a key that no header can hold, no model, folders that are none, or a file of votes that trainers
            would not read.
        OSError: the port is taken, or the file of votes cannot be written.
    """
    key = key or os.environ.get(KEY_VARIABLE, "")
    if not key.isascii() or key != key.strip():
        raise ValueError(f"--api-key, {KEY_VARIABLE}: a header holds only ASCII, without blanks at its ends")
    metrics, kept = Counters(), open_votes(votes) if votes else None
    with open_socket(host, port) as listener:  # before models are read, as it may be taken
        if not key and not is_loopback(host):
            LOGGER.warning(
                f"serve: every program that reaches {host} can use this server: set --api-key or {KEY_VARIABLE}"
            )
        policies, scorers = open_models(folders, dtype, limits, metrics)
        service = Service(policies, scorers, limits, metrics, key, kept)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        app = make_app(service)
        if not key and is_loopback(host):
            only_by_local_names(app, host)
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", ws="none")
        DrainingServer(config, service, f"{', '.join([*policies, *scorers])} at {address}").run(sockets=[listener])
    LOGGER.info("serve: stopped")


def open_socket(host: str, port: int) -> socket.socket:
    """A bound socket, which does not listen yet."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"{host}:{port} cannot be listened on ({error.strerror}): choose another --port") from error
    return listener


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def only_by_local_names(app: Starlette, host: str) -> None:
    """Refuse requests whose Host header is neither `host` nor a name of this machine's loopback, with status 400.

    A page of another site could otherwise have its own name resolved to 127.0.0.1 and be of the same origin as the
    server, whose answers and votes a browser on this machine would then let it read.
    """
    names = [host, f"[{host}]", "localhost", "127.0.0.1", "[::1]"]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)


class DrainingServer(uvicorn.Server):
    """Uvicorn, whose first signal refuses new requests with 503 until the running ones have ended."""

    def __init__(self, config: uvicorn.Config, service: Service, title: str):
        super().__init__(config)
        self.service, self.title = service, title
        self.loop: asyncio.AbstractEventLoop

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        LOGGER.info(f"serve: {self.title}")  # it is listening now

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # then uvicorn waits for nothing, and requests and models would speak to a closed loop
            for connection in list(self.server_state.connections):
                connection.transport.abort()  # as if its client had gone away
            if self.server_state.tasks:
                await asyncio.wait(self.server_state.tasks, timeout=1.0)
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: object) -> None:
        if self.service.draining:
            self.should_exit = self.force_exit = True
            return
        self.service.draining = True
        self.loop.call_soon_threadsafe(lambda: self.loop.create_task(self._stop_when_idle()))

    async def _stop_when_idle(self) -> None:
        LOGGER.info(f"serve: stopping after {self.service.active} running request(s); a second signal ends them")
        while self.service.active:
            await self.service.idle.wait()
        self.should_exit = True
