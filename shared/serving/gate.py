"""The outermost layer of the service: who asks, under which name, what is noted, and what every reply says.

A request gets an id, its host and its key are looked at before anything of its body is read, its reply gets the
headers of `security`, and one line of the log and one count say how it ended. An error that nobody expected becomes a
500 here; what it was stands in the log only.
"""

import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.serving.errors import ApiError
from shared.serving.logs import log
from shared.serving.security import DOCS_POLICY, HEADERS, KeyRing, host_of
from shared.serving.service import Service

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json"})
KNOWN_PATHS = OPEN_PATHS | {
    "/metrics",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/classify",
}
CLIENT_LEFT = 499  # no status of HTTP: nobody was there to read one; nginx counts them under this number
OWN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Gate:
    """Lets requests in, and writes down how they end.

    Args:
        app: The application behind it.
        service: Says whether requests are taken, and counts.
        keys: Who may call.
        hosts: Names under which it may be asked; none means any.
        is_preflight: Whether a browser may ask without a key what it may ask (CORS).
    """

    def __init__(
        self, app: ASGIApp, service: Service, keys: KeyRing, hosts: Sequence[str], is_preflight: bool
    ) -> None:
        self.app, self.service, self.keys = app, service, keys
        self.hosts, self.is_preflight = frozenset(host.lower() for host in hosts), is_preflight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, headers, path = time.monotonic(), Headers(scope=scope), scope["path"]
        given = headers.get("x-request-id", "")
        request_id = given if OWN_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        fields: dict[str, Any] = {}
        scope.setdefault("state", {}).update(started=started, note=fields.update)
        status = 0

        async def send_more(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    added[name] = value
                if path == "/docs":
                    added["Content-Security-Policy"] = DOCS_POLICY
                added["X-Request-Id"] = request_id
                if self.service.draining:
                    added["Connection"] = "close"
            await send(message)

        try:
            self._check(scope, headers, fields)
            await self.app(scope, receive, send_more)
        except ApiError as error:
            await error.response()(scope, receive, send_more)
        except ClientDisconnect:
            fields["ended"], status = "left", status or CLIENT_LEFT
        except Exception:
            log("unexpected error", logging.ERROR, exc_info=True, id=request_id)
            if not status:
                await ApiError(500, "a fault of the server", code="internal").response()(
                    scope, receive, send_more
                )
            else:
                raise  # half of a reply cannot be taken back: the connection is closed
        finally:
            seconds = time.monotonic() - started
            endpoint = endpoint_of(path)
            self.service.metrics.requests.labels(endpoint, str(status)).inc()
            self.service.metrics.request_seconds.labels(endpoint).observe(seconds)
            level = logging.DEBUG if path in OPEN_PATHS or path == "/metrics" else logging.INFO
            line = {
                "method": scope["method"],
                "endpoint": endpoint,
                "status": status,
                "seconds": round(seconds, 4),
            }
            log("request", level, id=request_id, **line | fields)

    def _check(self, scope: Scope, headers: Headers, fields: dict[str, Any]) -> None:
        """Refuse another host, a missing key, and new work while the server ends. Raises ApiError."""
        if self.hosts and host_of(headers.get("host", "")) not in self.hosts:
            raise ApiError(
                403, "the header Host names another host than this one", headers={"Connection": "close"}
            )
        size = len(scope["raw_path"]) + len(scope["query_string"])
        if (
            size + sum(len(name) + len(value) for name, value in scope["headers"])
            > self.service.limits.max_head_bytes
        ):
            raise ApiError(431, "the head of the request is too large", headers={"Connection": "close"})
        path = scope["path"]
        if path in OPEN_PATHS:
            return
        if not self.keys.is_open and not (self.is_preflight and scope["method"] == "OPTIONS"):
            owner = self.keys.owner(headers.get("authorization", ""))
            if owner is None:
                raise ApiError(
                    401,
                    "the header Authorization must hold a key of this server: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
                )
            fields["key"] = owner
        if self.service.draining and path != "/metrics":
            raise ApiError(
                503,
                "the server is about to end",
                code="draining",
                headers={"Retry-After": "1", "Connection": "close"},
            )


def endpoint_of(path: str) -> str:
    """Return the address without what a caller can choose, so that labels stay few."""
    if path in KNOWN_PATHS:
        return path
    return "/v1/models/{model}" if path.startswith("/v1/models/") else "other"
