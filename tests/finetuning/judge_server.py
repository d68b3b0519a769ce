"""A real HTTP server on the loopback address that misbehaves as a test asks: each request is answered by a function."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Behaviour = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers by the next behaviour of its server; the last one stays."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.request_body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), json.loads(self.request_body)))
            rest = self.server.behaviours
            behave = rest.pop(0) if len(rest) > 1 else rest[0]
        try:
            behave(self)
        except (BrokenPipeError, ConnectionResetError):  # the client has had enough
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Be quiet."""

    def send(self, status: int, body: bytes, **headers: str) -> None:
        """Send a whole reply; an underscore in a header's name stands for a hyphen."""
        self.send_response(status)
        for name, value in ({"Content_Type": "application/json"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def says(text: object, finish: str = "stop") -> Behaviour:
    """Answer with this text, as an assistant."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return sends(json.dumps({"choices": [choice]}).encode())


def sends(body: bytes, status: int = 200, **headers: str) -> Behaviour:
    """Answer with these bytes."""
    return lambda handler: handler.send(status, body, **headers)


def streams(chunks: list[bytes], ends: bool = True) -> Behaviour:
    """Send these bytes as chunks of an event stream; without `ends` the connection is closed in the middle."""

    def behave(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for chunk in chunks:
            handler.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
            handler.wfile.flush()
        if ends:
            handler.wfile.write(b"0\r\n\r\n")
        else:
            handler.close_connection = True

    return behave


@contextmanager
def judge_server(*behaviours: Behaviour) -> Iterator[ThreadingHTTPServer]:
    """Yield a running server with `url` and `seen`: (path, headers, body) of each request; it is closed at the end."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    server.lock, server.seen, server.behaviours = threading.Lock(), [], list(behaviours)
    server.over = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
