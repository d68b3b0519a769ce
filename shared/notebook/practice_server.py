"""A small chat server on this machine, to practise on: it answers by a function, and makes trouble when told to.

It speaks as much of OpenAI's protocol as a client needs that sends messages and reads one reply. It listens on the
loopback address only, at a port that the system chooses, and ends with the process. Left out: streaming, keys, models.
"""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class PracticeServer:
    """Answers chat requests by `reply`, which is given the last message's text and returns the assistant's.

    Attributes:
        url: The address for a client, up to the version.
        trouble: Status, headers and body of the next replies, before `reply` is asked again.
        requests: The body of every request that arrived.
    """

    def __init__(self, reply: Callable[[str], str]) -> None:
        self.reply = reply
        self.trouble: list[tuple[int, dict[str, str], str]] = []
        self.requests: list[dict[str, Any]] = []
        practice = self

        class Handler(BaseHTTPRequestHandler):
            """Answers one connection."""

            def do_POST(self) -> None:
                """Note the request, and send what comes next."""
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                practice.requests.append(request)
                status, headers, body = practice._next(request)
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json"} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                """Write nothing to stderr."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _next(self, request: dict[str, Any]) -> tuple[int, dict[str, str], str]:
        if self.trouble:
            return self.trouble.pop(0)
        message = {"role": "assistant", "content": self.reply(request["messages"][-1]["content"])}
        return 200, {}, json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]})

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
