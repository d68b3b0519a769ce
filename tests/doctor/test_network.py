"""`shared/doctor/network.py`: servers that answer, refuse, redirect or never answer; the latter cost a bounded time."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from shared.doctor import network


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def silent():
    """The address of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/simple/"


@pytest.fixture
def answering():
    """The address of a server and what it was asked; it answers with the status that the path names."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append((self.command, self.path, dict(self.headers)))
            self.send_response(int(self.path.strip("/")))
            self.send_header("Location", "/200")
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.parametrize("status", [200, 302, 403, 404, 405, 500])
def test_any_answer_is_an_answer_and_no_redirect_is_followed(answering, status):
    host, asked = answering
    finding = network.check_network({"package index": f"http://{host}/{status}"})
    assert finding.status == "ok"
    assert [(method, path) for method, path, _ in asked] == [("HEAD", f"/{status}")]


def test_a_password_is_neither_sent_nor_shown(answering):
    host, asked = answering
    finding = network.check_network({"package index": f"http://name:secret@{host}/200"})
    assert finding.status == "ok"
    assert not any("secret" in str(headers) or "Authorization" in headers for *_, headers in asked)
    away = network.check_network({"package index": "http://name:secret@127.0.0.1:9/"}, 1)
    assert away.status == "note" and "secret" not in away.found + away.remedy


def test_a_server_that_never_answers_costs_the_time_limit_once(silent):
    start = time.monotonic()
    finding = network.check_network({"package index": silent, "model hub": silent}, 0.5)
    assert time.monotonic() - start < 3
    assert finding.status == "note"
    assert finding.found == "package index: no answer; model hub: no answer"


def test_a_name_that_takes_for_ever_to_look_up(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(30))
    start = time.monotonic()
    finding = network.check_network({"model hub": "http://slow.invalid/"}, 0.3)
    assert time.monotonic() - start < 3
    assert finding.found == "model hub: no answer"
    over.set()


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "pypi.org/simple", "http://", "http://[::1", "http://h:port/"]
)
def test_addresses_that_are_none(url):
    finding = network.check_network({"package index": url}, 1)
    assert finding.status == "note"
    assert finding.found in (
        "package index: its address is no http address",
        "package index: cannot be reached",
    )


def test_nobody_listens_at_the_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    finding = network.check_network({"package index": f"http://127.0.0.1:{port}/"}, 2)
    assert finding.found == "package index: cannot be reached"
    assert "PIP_INDEX_URL" in finding.remedy


def test_a_proxy_that_is_not_there_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("https_proxy", f"http://user:secret@127.0.0.1:{port}")
    finding = network.check_network({"package index": "https://pypi.invalid/simple/"}, 2)
    assert finding.status == "note"
    assert "HTTPS_PROXY" in finding.remedy and "secret" not in finding.remedy + finding.found


def test_mirrors_are_asked_in_the_place_of_the_originals(monkeypatch):
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.invalid")
    assert network.servers() == {
        "package index": "https://pypi.org/simple/",
        "model hub": "https://mirror.invalid",
    }
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.invalid/simple")
    assert network.servers()["package index"] == "https://index.invalid/simple"


def test_an_untrusted_certificate_has_its_own_words(monkeypatch):
    class Opener:
        def open(self, *_, **__):
            raise network.urllib.error.URLError("[SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer")

    monkeypatch.setattr(network.urllib.request, "build_opener", lambda *_: Opener())
    assert network.answer_of("https://pypi.org", 1) == "its certificate is not trusted"
