"""How much and how long: the numbers that keep one caller from taking a server away from the others.

`Limits` holds them. `GuardedConnection` watches a connection while nothing of HTTP is complete yet: a head that does
not come, a peer that does not read. `BodyGuard` reads a body before anybody else sees the request: not more bytes
than allowed, whether they are announced or come in chunks, and not slower than allowed.
"""

import asyncio
import json
import math
from dataclasses import dataclass, fields

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from shared.checks import require, whole_number
from shared.serving.errors import ApiError

DISCARDED = (
    8  # times the allowed bytes are read and thrown away, so that a client can read why it was refused
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes.

    Attributes:
        max_batch_size: Sequences that are written at a time.
        max_waiting: Sequences that may wait for a place; the next one is told to come later (429).
        context_length: Most tokens of a prompt and its continuation; None is the model's, but at most 2,048.
        max_new_tokens: Most tokens of a continuation; None is what the context has room for.
        max_sequences: Most sequences of a request: prompts times `n`.
        max_inputs: Most texts of a request to `/v1/embeddings` or `/v1/classify`.
        max_head_bytes, max_body_bytes: Of a request.
        max_connections: Open at a time.
        head_s, body_s: Seconds for the head of a request, and for its body.
        write_s: Seconds without progress after which a peer that does not read is given up.
        idle_s: Seconds that a connection is kept for another request.
        request_s: Seconds for a whole reply, the time in the queue included.
        notice_s: Seconds after SIGTERM in which new requests are still answered, by 503.
        drain_s: Seconds after SIGTERM for the requests that were accepted.
    """

    max_batch_size: int = 32
    max_waiting: int = 64
    context_length: int | None = None
    max_new_tokens: int | None = None
    max_sequences: int = 16
    max_inputs: int = 256
    max_head_bytes: int = 16_384
    max_body_bytes: int = 1_000_000
    max_connections: int = 512
    head_s: float = 10.0
    body_s: float = 20.0
    write_s: float = 30.0
    idle_s: float = 30.0
    request_s: float = 300.0
    notice_s: float = 0.5
    drain_s: float = 60.0

    def __post_init__(self) -> None:
        """Refuse numbers that are none, or too small (TypeError, ValueError)."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if field.name.endswith("_s"):
                require(field.name, value, 0 < value < math.inf, "above 0 and finite")
            else:
                whole_number(field.name, value, 0 if field.name == "max_waiting" else 1)


def raw_reply(status: int, phrase: str, message: str) -> bytes:
    """Return a whole reply in bytes that ends its connection, for where there is no request to answer yet."""
    body = json.dumps(ApiError(status, message).body()).encode()
    head = f"HTTP/1.1 {status} {phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


def guarded_connection(limits: Limits) -> type[H11Protocol]:
    """Return uvicorn's connection with these limits on it."""

    class GuardedConnection(H11Protocol):
        """A connection that is closed if a head does not come or its peer does not read."""

        _head_timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Take a connection, or refuse it where there are too many."""
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                transport.write(raw_reply(503, "Service Unavailable", "there are too many connections"))
                transport.close()
                return
            self._head_timer = self.loop.call_later(limits.head_s, self._no_head)

        def data_received(self, data: bytes) -> None:
            """Read on; the clock runs while the head of a request is not complete."""
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop_timer("_head_timer")
            elif self._head_timer is None and not self.transport.is_closing():
                self._head_timer = self.loop.call_later(limits.head_s, self._no_head)

        def _no_head(self) -> None:
            self._head_timer = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                if self.conn.trailing_data[0]:  # something was begun, so somebody may read why it was ended
                    self.transport.write(
                        raw_reply(408, "Request Timeout", "the request did not come in time")
                    )
                self.transport.close()

        def pause_writing(self) -> None:
            """Stop writing to a peer that does not read, and give it up after a while."""
            super().pause_writing()
            self._stop_timer("_write_timer")
            self._write_timer = self.loop.call_later(limits.write_s, self.transport.abort)

        def resume_writing(self) -> None:
            """Go on: the peer reads."""
            super().resume_writing()
            self._stop_timer("_write_timer")

        def connection_lost(self, exc: Exception | None) -> None:
            """Forget the clocks."""
            self._stop_timer("_head_timer")
            self._stop_timer("_write_timer")
            super().connection_lost(exc)

        def _stop_timer(self, name: str) -> None:
            timer = getattr(self, name)
            if timer is not None:
                timer.cancel()
                setattr(self, name, None)

    return GuardedConnection


class BodyGuard:
    """Reads the body of a request, within its limits, before the application sees the request.

    Args:
        app: The application.
        max_bytes, seconds: The limits.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self.app, self.max_bytes, self.seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, then pass on; or answer 413 (too large) or 408 (too slow) and end the connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.seconds):
                body = await self._read(scope, receive)
        except TimeoutError:
            error = ApiError(408, "the body did not come in time", headers={"Connection": "close"})
            await error.response()(scope, receive, send)
            return
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is not None:  # else the client has left
            await self.app(scope, once(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        body, size, more = bytearray(), 0, True
        too_large = ApiError(
            413,
            f"the body must have at most {self.max_bytes:,} bytes",
            code="request_too_large",
            headers={"Connection": "close"},
        )
        if int(announced) > DISCARDED * self.max_bytes:  # h11 has checked that these are digits
            raise too_large
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size <= self.max_bytes:
                body += chunk
            elif size > DISCARDED * self.max_bytes:
                raise too_large
        if size > self.max_bytes:
            raise too_large
        return bytes(body)


def once(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body, and then what the connection gives: that the client has left."""
    given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return given.pop() if given else await receive()

    return receive_again
