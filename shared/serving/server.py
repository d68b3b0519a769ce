"""How the service starts and ends. It ends without dropping what it has accepted.

At SIGTERM or Ctrl-C `/readyz` says no and new requests are answered by 503, for a moment in which a load balancer can
notice; then nobody is let in any more, and what was accepted is written to its end, for at most `drain_s`. A second
signal ends it at once.
"""

import asyncio
import contextlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI
from uvicorn.server import HANDLED_SIGNALS

from shared.serving.limits import Limits, guarded_connection
from shared.serving.logs import log
from shared.serving.service import Service

BACKLOG = 1024  # connections that may wait to be accepted


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound, before anything that takes long; port 0 takes a free one.

    Raises OSError if the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # there it would let two servers share a port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None
    bound.setblocking(False)
    return bound


def url_of(bound: socket.socket) -> str:
    """Return the address of a bound socket for clients."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """uvicorn with our limits, which drains.

    Args:
        app: The application of `create_app`.
        service: The one behind it.
        on_start: Called when requests are taken.
    """

    def __init__(self, app: FastAPI, service: Service, on_start: Callable[[], None] | None = None) -> None:
        limits: Limits = service.limits
        super().__init__(
            uvicorn.Config(
                app,
                http=guarded_connection(limits),
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                h11_max_incomplete_event_size=limits.max_head_bytes,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=max(1, round(limits.idle_s)),
                timeout_graceful_shutdown=max(1, round(limits.drain_s)),
            )
        )
        self.service, self.limits, self.on_start = service, limits, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to compute, then to listen."""
        self.service.start(asyncio.get_running_loop())
        await self.service.warm_up()
        await super().startup(sockets)
        if self.on_start is not None:
            self.on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain: refuse for a moment, then close, then wait for what was accepted."""
        started = time.monotonic()
        self.service.draining = True
        log("draining", open=self.service.worker.n_open)
        while time.monotonic() < started + self.limits.notice_s and not self.force_exit:
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)
        await asyncio.to_thread(self.service.stop)
        log("stopped", seconds=round(time.monotonic() - started, 3))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let signals end the server, and the process with status 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in HANDLED_SIGNALS}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: object) -> None:
        """End at the first signal, at once at the second."""
        self.force_exit, self.should_exit = self.should_exit, True
