"""What one caller may take from the others: keys, sizes, times, the queue; and what happens when a caller leaves."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from deployment.serve_client import ask
from shared.serving.logs import JsonLines
from shared.serving.security import hash_of
from tests.serving.running import running

pytestmark = pytest.mark.service
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def tight(small):
    """Run a server with a place, one that may wait, and little time."""
    with running(small, max_batch_size=1, max_waiting=1, request_s=20.0, max_connections=20) as found:
        yield found


@pytest.fixture
def slow(tight, monkeypatch):
    """Make every step of that server take a while."""
    step = tight.service.engine.step
    monkeypatch.setattr(tight.service.engine, "step", lambda: (time.sleep(0.02), step())[1])
    yield tight
    assert tight.is_idle()


def raw(port: int, *parts: bytes, pause: float = 0.0, seconds: float = 20.0) -> bytes:
    """Send bytes, with pauses, and return all that comes until the connection ends; b"open" if it does not."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        received = b""
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            while chunk := connection.recv(65536):
                received += chunk
        except TimeoutError:
            return b"open"
        except OSError:
            pass
        return received


def status_of(reply: bytes) -> int:
    head, _, body = reply.partition(b"\r\n\r\n")
    if head:
        assert json.loads(body)["error"]["message"]
    return int(head.split()[1]) if head else 0


# --- who may call


def test_keys(small):
    with running(small, keys={"phone": hash_of("sk-phone"), "laptop": hash_of("sk-laptop")}) as served:
        for path in ("/healthz", "/readyz", "/openapi.json"):
            assert served.client.get(path).status_code == 200
        for path in ("/v1/models", "/metrics", "/nothing"):
            refused = served.client.get(path)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert refused.json()["error"]["code"] == "invalid_api_key"
        for key in ("sk-phone", "sk-laptop"):
            assert (
                served.client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
            )
        # Nobody without a key makes the server read a body.
        announced = HEAD + b"Content-Length: 900000\r\n\r\n"
        assert status_of(raw(served.port, announced)) == 401


def test_other_hosts(small):
    with running(small, hosts=["localhost", "127.0.0.1"]) as served:
        assert served.client.get("/v1/models").status_code == 200
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
            assert served.client.get("/v1/models", headers={"Host": host}).status_code == 403


# --- how much


def test_bodies_that_are_too_large(served):
    limit = served.service.limits.max_body_bytes
    body = json.dumps({"model": "small", "prompt": "x"}).encode()
    just = body + b" " * (limit - len(body))
    kind = {"Content-Type": "application/json"}

    def in_chunks(content: bytes):
        yield from (content[i : i + 50_000] for i in range(0, len(content), 50_000))

    for send in (lambda content: content, in_chunks):
        assert served.client.post("/v1/completions", content=send(just), headers=kind).status_code == 200
        refused = served.client.post("/v1/completions", content=send(just + b" "), headers=kind)
        assert refused.status_code == 413 and refused.json()["error"]["code"] == "request_too_large"
    # What is announced far too large is not read at all, and chunks without end are not read for ever.
    assert status_of(raw(served.port, HEAD + b"Content-Length: 99999999999\r\n\r\n")) == 413
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    endless = raw(served.port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 200)
    assert status_of(endless) in (0, 413)  # the reply may be lost when the connection is cut


def test_heads_that_are_too_large(served):
    for head in (b"GET /v1/models?" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",):
        assert raw(served.port, head).split()[1] in (b"400", b"431")
    assert served.client.get("/healthz", headers={"X": "a" * 20_000}).status_code in (400, 431)


def test_too_many_connections(tight):
    connections = [socket.create_connection(("127.0.0.1", tight.port)) for _ in range(20)]
    try:
        time.sleep(0.1)
        reply = raw(tight.port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status_of(reply) in (0, 503)
    finally:
        for connection in connections:
            connection.close()
    time.sleep(0.2)
    assert tight.client.get("/healthz").status_code == 200


# --- how long


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ((), 0),  # half-open: nothing comes
        ((b"POST /v1/comp",), 408),  # the head does not come to its end
        (tuple(bytes([byte]) for byte in HEAD[:15]), 408),  # it comes byte by byte
        ((HEAD + b"Content-Length: 50\r\n\r\n{",), 408),  # the body does not come
        ((HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",), 408),
    ],
)
def test_slow_senders_are_given_up(served, parts, status):
    started = time.monotonic()
    # Who goes on sending after the end may not get to read why it ended.
    allowed = (status, 0) if len(parts) > 3 else (status,)
    assert status_of(raw(served.port, *parts, pause=0.1 if len(parts) > 3 else 0)) in allowed
    assert time.monotonic() - started < 15  # and not for ever, on a busy machine either


def test_a_slow_second_head_on_a_kept_connection(served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in connection.recv(65536)
        connection.sendall(b"GET /hea")
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    assert status_of(received) == 408


def test_a_peer_that_does_not_read_is_given_up(small):
    with running(small, max_batch_size=16, write_s=0.5, max_sequences=16) as served:
        body = json.dumps(
            {"model": "small", "prompt": "x", "n": 16, "stream": True, "max_tokens": 250, "logprobs": 5}
        )
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", served.port))
            connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
            end = time.monotonic() + 20
            while served.service.worker.n_open == 0 and time.monotonic() < end:
                time.sleep(0.01)
            assert served.is_idle(20)
            # The connection is cut: nothing waits for the peer any more.
            while served.server.server_state.tasks and time.monotonic() < end:
                time.sleep(0.05)
            assert not served.server.server_state.tasks


def test_a_full_queue_says_when_to_come_again(slow):
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(slow.complete, max_tokens=60) for _ in range(2)]
        while slow.service.worker.n_open < 2:
            time.sleep(0.005)
        refused = slow.complete(max_tokens=1)
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert slow.complete(max_tokens=1, stream=True).status_code == 429  # not an event in a stream
        # All or none: two sequences find no place for one of them.
        assert [future.result().status_code for future in waiting] == [200, 200]
    assert slow.complete(["a", "b", "c"], max_tokens=1).status_code == 400  # never would there be room
    assert slow.complete(["a", "b"], max_tokens=1).status_code == 200
    assert slow.number("llm_refused_total") == 2


def test_deadlines(slow):
    wish = {"X-Request-Timeout": "0.3"}
    # A reply that ends by itself would be in time; the most probable one goes on.
    asked = {"prompt": "the", "max_tokens": 200, "temperature": 0}
    late = slow.post("/v1/completions", wish, **asked)
    assert late.status_code == 408 and late.json()["error"]["code"] == "timeout"
    streamed = slow.post("/v1/completions", wish, **asked, stream=True)
    *pieces, last = [line for line in streamed.text.split("\n\n") if line]
    assert len(pieces) > 1 and json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    at_once = slow.post("/v1/completions", {"X-Request-Timeout": "1e-9"}, prompt="the", stream=True)
    assert at_once.status_code in (200, 408) and '"code":"timeout"' in at_once.text  # begun or not
    for wrong in ("-1", "0", "nan", "inf", "soon", "1e400"):
        assert slow.post("/v1/completions", {"X-Request-Timeout": wrong}, prompt="x").status_code == 400
    assert slow.is_idle()
    # Nobody gets more than the server's own limit.
    slow.service.limits.__dict__["request_s"] = 0.2
    try:
        assert slow.post("/v1/completions", {"X-Request-Timeout": "60"}, **asked).status_code == 504
    finally:
        slow.service.limits.__dict__["request_s"] = 20.0


# --- who leaves


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_text(slow, stream):
    before = slow.number("llm_generated_tokens_total")
    body = json.dumps({"model": "small", "prompt": "the", "max_tokens": 250, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", slow.port)) as connection:
        connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while slow.number("llm_generated_tokens_total") < before + 3:
            time.sleep(0.01)
        # A second one waits, and leaves before it is its turn.
        with socket.create_connection(("127.0.0.1", slow.port)) as second:
            second.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            while slow.service.worker.n_open < 2:
                time.sleep(0.01)
    assert slow.is_idle(20)
    assert slow.number("llm_running") == slow.number("llm_cache_tokens") == 0
    assert slow.number("llm_generated_tokens_total") < before + 100


# --- what breaks


def test_a_step_that_fails_ends_what_ran_and_nothing_else(tight, monkeypatch):
    engine, step = tight.service.engine, tight.service.engine.step
    expected = tight.complete(max_tokens=5).json()["choices"]
    failures = iter([RuntimeError("no memory for a secret")])

    def fail_once():
        for failure in failures:
            raise failure
        return step()

    monkeypatch.setattr(engine, "step", fail_once)
    broken = tight.complete(max_tokens=5)
    assert broken.status_code == 500 and "secret" not in broken.text
    assert tight.complete(max_tokens=5).json()["choices"] == expected
    assert tight.number("llm_failed_steps_total") == 1
    # One that fails again and again is not healthy, until it works again.
    with monkeypatch.context() as patched:
        patched.setattr(engine, "step", lambda: 1 / 0)
        assert [tight.complete(max_tokens=1).status_code for _ in range(3)] == [500] * 3
        assert tight.client.get("/healthz").status_code == tight.client.get("/readyz").status_code == 503
    assert tight.complete(max_tokens=1).status_code == 200 == tight.client.get("/readyz").status_code


def test_logits_that_are_no_numbers(small):
    with running(small) as served:
        engine = served.service.engine
        read = engine._read
        engine._read = lambda pieces: read(pieces) * float("nan")
        assert served.complete(max_tokens=3).status_code == 500
        engine._read = read
        assert served.complete(max_tokens=3).status_code == 200


def test_an_error_that_nobody_expected(served, monkeypatch, caplog):
    def fail(*_: object, **__: object) -> None:
        raise KeyError("se" + "cret")

    monkeypatch.setattr(served.service, "jobs", fail)
    response = served.complete()
    assert response.status_code == 500 and response.json()["error"]["code"] == "internal"
    assert "secret" not in response.text and response.headers["x-content-type-options"] == "nosniff"
    # The log says where it happened, without the values in the message.
    record = next(record for record in caplog.records if record.getMessage() == "unexpected error")
    line = json.loads(JsonLines().format(record))
    assert (
        line["error"] == "KeyError"
        and ", in complete" in line["traceback"]
        and "secret" not in line["traceback"]
    )


def test_a_thread_that_has_died_is_told(small):
    with running(small) as served:
        served.service.worker.stop()
        assert served.client.get("/healthz").status_code == served.client.get("/readyz").status_code == 503


# --- draining


def test_draining(small):
    with running(small, notice_s=1.0, max_batch_size=2) as served:
        step = served.service.engine.step
        served.service.engine.step = lambda: (time.sleep(0.02), step())[1]
        found = {}

        def write() -> None:
            found["answer"] = asyncio.run(ask(served.url, "the old mill", 80, model="small"))

        thread = threading.Thread(target=write)
        thread.start()
        while not served.service.engine.n_running:
            time.sleep(0.005)
        served.server.should_exit = True
        while not served.service.draining:
            time.sleep(0.005)
        # It says so, refuses what is new, and closes its connections.
        assert httpx.get(f"{served.url}/readyz").status_code == 503
        assert httpx.get(f"{served.url}/healthz").status_code == 200
        refused = served.complete(max_tokens=1)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert refused.headers["connection"] == "close" and refused.headers["retry-after"]
        thread.join(20)
    assert found["answer"].complete and found["answer"].n_tokens == 80
