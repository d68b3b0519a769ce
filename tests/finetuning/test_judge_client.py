"""The client of a judge, against a real HTTP server that misbehaves in every way we know."""

import contextlib
import json
import os
import threading
import time
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.finetuning.judge_client import (
    DEFAULT_URL,
    ChatClient,
    Endpoint,
    Limits,
    endpoint_from_environment,
    retry_after_seconds,
)
from shared.finetuning.judge_replies import (
    EventStream,
    JudgeError,
    ReplyCache,
    message_from_events,
    message_from_json,
)
from tests.finetuning.judge_server import Handler, judge_server, says, sends, streams

KEY = "sk-Secret/Key+123=="
HELLO = [{"role": "user", "content": "hello"}]


class Clock:
    """A clock that only a sleep moves on."""

    def __init__(self) -> None:
        self.now, self.sleeps = 0.0, []

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds

    def __call__(self) -> float:
        return self.now


def client_of(server, clock: Clock | None = None, cache=None, key: str = KEY, **limits: object) -> ChatClient:
    clock = clock or Clock()
    options = {"sleep": clock.sleep, "clock": clock, "uniform": lambda: 1.0}
    return ChatClient(Endpoint(server.url, "m", key), Limits(**limits), cache=cache, **options)


def error_of(*behaviours, clock: Clock | None = None, **limits: object) -> tuple[JudgeError, int]:
    """Return the error of a request to such a server, and how many requests arrived."""
    with judge_server(*behaviours) as server:
        with pytest.raises(JudgeError) as caught:
            client_of(server, clock, **limits).complete(HELLO)
        assert "\n" not in str(caught.value) and KEY not in str(caught.value)
        assert caught.value.__cause__ is None and (
            caught.value.__context__ is None or caught.value.__suppress_context__
        )
        return caught.value, len(server.seen)


# --- what is sent


def test_a_request_is_what_the_protocol_says():
    schema = {"type": "object"}
    with judge_server(says("hi ö")) as server:
        assert client_of(server).complete(HELLO, schema) == "hi ö"
        ((path, headers, body),) = server.seen
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}" and headers["Accept-Encoding"] == "identity"
    assert headers["Content-Type"] == "application/json"
    assert body["model"] == "m" and body["messages"] == HELLO and body["temperature"] == 0
    assert body["response_format"]["type"] == "json_schema"
    assert body["response_format"]["json_schema"] == {"name": "verdict", "strict": True, "schema": schema}


def test_without_a_key_and_a_schema_none_is_sent():
    with judge_server(says("hi")) as server:
        client_of(server, key="").complete([{"role": "user", "content": "lone \ud800 surrogate"}])
        ((_, headers, body),) = server.seen
    assert "Authorization" not in headers and "response_format" not in body


def test_a_proxy_of_the_environment_is_no_way_to_this_machine(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with judge_server(says("hi")) as server:
        assert client_of(server).complete(HELLO) == "hi"


@pytest.mark.parametrize(
    "url",
    [
        "localhost:11434",
        "ftp://host/v1",
        "http://",
        "http://user:secret@host/v1",
        "https://host/v1?key=secret",
        "https://host/v1#secret",
        "http://host:secret/v1",
        "http://[secret/v1",
    ],
)
def test_addresses_that_cannot_be_are_refused_and_not_shown(url):
    with pytest.raises(ValueError, match="url must be http") as caught:
        Endpoint(url)
    assert "secret" not in str(caught.value)


def test_a_key_goes_over_https_or_to_this_machine_only():
    for url in (
        "https://api.example.com/v1",
        "http://localhost:1/v1",
        "http://127.0.0.9/v1",
        "http://[::1]:8/v1",
    ):
        assert KEY not in repr(Endpoint(url, "m", KEY))
    for url in ("http://api.example.com/v1", "http://192.168.0.4/v1", "http://localhost.example.com/v1"):
        Endpoint(url, "m")
        with pytest.raises(ValueError, match="url must be https where a key is sent") as caught:
            Endpoint(url, "m", KEY)
        assert KEY not in str(caught.value)
    for key in ("two words", "line\nbreak", "ключ"):
        with pytest.raises(ValueError, match="key must be printable ASCII") as caught:
            Endpoint("https://h/v1", "m", key)
        assert key not in str(caught.value)
    with pytest.raises(ValueError, match="model must be the name"):
        Endpoint("https://h/v1", " ")


def test_the_endpoint_of_the_environment(monkeypatch):
    for name in ("LLM_JUDGE_URL", "LLM_JUDGE_MODEL", "LLM_JUDGE_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert endpoint_from_environment() == Endpoint() and Endpoint().url == DEFAULT_URL
    monkeypatch.setenv("LLM_JUDGE_URL", "https://h/v1")
    monkeypatch.setenv("LLM_JUDGE_MODEL", "big")
    monkeypatch.setenv("LLM_JUDGE_KEY", KEY)
    assert endpoint_from_environment() == Endpoint("https://h/v1", "big", KEY)


@pytest.mark.parametrize("name", vars(Limits()))
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_limits_are_above_zero(name, value):
    with pytest.raises(ValueError, match=f"{name} must be above 0"):
        Limits(**{name: value})


# --- trying again


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_temporary_refusals_are_tried_again_with_growing_waits(status):
    clock = Clock()
    with judge_server(*[sends(b"busy", status)] * 3, says("hi")) as server:
        client = client_of(server, clock)
        assert client.complete(HELLO) == "hi"
    assert clock.sleeps == [1.0, 2.0, 4.0]
    assert (client.n_requests, client.n_retries) == (4, 3)


def test_jitter_takes_at_most_half_of_a_wait():
    for share, expected in ((0.0, 0.5), (0.5, 0.75), (1.0, 1.0)):
        clock = Clock()
        with judge_server(sends(b"", 503), says("hi")) as server:
            client = ChatClient(Endpoint(server.url), sleep=clock.sleep, clock=clock, uniform=lambda: share)  # noqa: B023
            client.complete(HELLO)
        assert clock.sleeps == [expected]


def test_tries_end():
    clock = Clock()
    error, n_requests = error_of(sends(b"busy", 503), clock=clock, max_tries=3)
    assert error.reason == "status 503" and str(error) == "status 503: busy"
    assert n_requests == 3 and clock.sleeps == [1.0, 2.0]


def test_waits_are_capped():
    clock = Clock()
    error_of(sends(b"busy", 503), clock=clock, max_tries=6, max_wait_s=3)
    assert clock.sleeps == [1.0, 2.0, 3.0, 3.0, 3.0]


def as_date(seconds: float) -> str:
    """The time in so many seconds, as the header says it: in whole seconds."""
    return format_datetime(datetime.fromtimestamp(time.time() + seconds, UTC), usegmt=True)


@pytest.mark.parametrize("value", [lambda: "20", lambda: as_date(25)], ids=["seconds", "date"])
def test_retry_after_is_obeyed(value):
    def refuses(handler: Handler) -> None:
        handler.send(429, b"", Retry_After=value())

    clock = Clock()
    with judge_server(refuses, says("hi")) as server:
        assert client_of(server, clock).complete(HELLO) == "hi"
    assert 10 < clock.sleeps[0] <= 25


def test_a_wish_to_wait_too_long_is_not_disobeyed_but_ends_the_matter():
    clock = Clock()
    error, n_requests = error_of(sends(b"", 429, Retry_After="31"), clock=clock, max_wait_s=30)
    assert error.retry_after == 31 and n_requests == 1 and clock.sleeps == []


def test_no_wait_goes_beyond_the_deadline():
    clock = Clock()
    _, n_requests = error_of(sends(b"", 503, Retry_After="4"), clock=clock, deadline_s=10, max_tries=9)
    assert clock.sleeps == [4, 4] and n_requests == 3


@pytest.mark.parametrize(
    "value, seconds",
    [
        ("0", 0),
        (" 12 ", 12),
        ("9" * 5000, 999_999_999_999),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("", None),
        ("-3", None),
        ("1.5", None),
        ("nan", None),
        ("²", None),
        ("soon", None),
        ("Thu, 99 Jan 1970 00:00:00 GMT", None),
    ],
)
def test_the_header_retry_after(value, seconds):
    assert retry_after_seconds(value, now=10) == seconds


@given(st.text(max_size=40))
def test_any_header_is_a_wait_or_none(value):
    assert (found := retry_after_seconds(value)) is None or 0 <= found < 1e13


# --- what is not tried again


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_a_wrong_setting_ends_at_once_and_says_so(status):
    error, n_requests = error_of(sends(b'{"error": "no"}', status))
    assert error.setting and n_requests == 1 and f"status {status}" in str(error)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_ends_and_concerns_itself_only(status):
    error, n_requests = error_of(sends(b"too long", status))
    assert not error.setting and not error.temporary and n_requests == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(status):
    with judge_server(says("evil")) as other:
        error, _ = error_of(sends(b"", status, Location=f"{other.url}/chat/completions"))
        assert other.seen == []
    assert error.setting and "not followed" in str(error)


def test_an_error_that_repeats_the_key_is_told_without_it():
    for body in (f"invalid key {KEY}", json.dumps({"error": KEY, "again": f"Bearer {KEY}"})):
        error, _ = error_of(sends(body.encode(), 401))
        assert "***" in str(error)
    error, _ = error_of(sends(b"x" * 100_000, 400))
    assert len(str(error)) < 300


# --- bad replies


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"<html>hello</html>",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'{"choices": []}',
        b'{"choices": {}}',
        b'{"choices": [null]}',
        b'{"choices": [{"message": {"content": null}}]}',
        b'{"choices": [{"message": {"content": 4}}]}',
        b'{"choices": [{"message": "hi"}]}',
        b'{"error": "overloaded"}',
        b"[" * 200_000,
    ],
)
def test_malformed_replies(body):
    error, n_requests = error_of(sends(body))
    assert error.reason == "malformed reply" and n_requests == 1


KEYS = st.sampled_from(["choices", "message", "content", "delta", "finish_reason"])
BODIES = st.recursive(
    st.none() | st.text(max_size=4),
    lambda inner: st.dictionaries(KEYS, inner | st.lists(inner, max_size=2), max_size=3),
    max_leaves=8,
)


@given(st.binary(max_size=60) | BODIES.map(lambda body: json.dumps(body).encode()))
def test_any_body_is_a_text_or_an_error(body):
    with contextlib.suppress(JudgeError):
        assert isinstance(message_from_json(body), str)
    with contextlib.suppress(JudgeError):
        assert isinstance(message_from_events([body.decode("utf-8", "replace")]), str)


def test_a_reply_cut_at_its_limit_is_none():
    assert error_of(says("{", finish="length"))[0].reason == "reply cut at max_tokens"


def test_a_compressed_reply_is_refused():
    assert error_of(sends(b"x", Content_Encoding="gzip"))[0].reason == "compressed reply"


def endless(handler: Handler) -> None:
    """A reply without an end."""
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.over.is_set():
        handler.wfile.write(b"x" * 65_536)


def test_a_huge_reply_is_not_read_to_its_end():
    error, n_requests = error_of(endless, max_bytes=200_000)
    assert error.reason == "reply too large" and n_requests == 1
    assert error_of(sends(b"x" * 1001, 503), max_bytes=1000)[0].reason == "reply too large"


def cut(handler: Handler) -> None:
    """A reply that announces more than it brings."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def hang_up(handler: Handler) -> None:
    """No reply at all."""
    handler.close_connection = True


@pytest.mark.parametrize("behaviour", [cut, hang_up])
def test_a_connection_that_breaks_is_tried_again(behaviour):
    with judge_server(behaviour, says("hi")) as server:
        client = client_of(server)
        assert client.complete(HELLO) == "hi" and client.n_retries == 1
    error, n_requests = error_of(behaviour, max_tries=2)
    assert error.reason == "connection broken" and n_requests == 2


def test_nobody_listens():
    with judge_server(says("hi")) as server:
        pass  # closed again
    with pytest.raises(JudgeError, match=r"no connection: 127\.0\.0\.1"):
        client_of(server, max_tries=2).complete(HELLO)


# --- slow servers: real time, short limits


def silent(handler: Handler) -> None:
    handler.server.over.wait(5)


def drips_body(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.over.wait(0.03):
        handler.wfile.write(b" ")


def drips_header(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while not handler.server.over.wait(0.03):
        handler.wfile.write(b"a")


def test_silence_is_a_time_out_and_tried_again():
    with judge_server(silent, says("hi")) as server:
        client = client_of(server, read_s=0.15)
        assert client.complete(HELLO) == "hi" and client.n_retries == 1
    assert error_of(silent, read_s=0.1, max_tries=2)[0].reason == "time-out"


@pytest.mark.parametrize("behaviour", [silent, drips_body, drips_header])
def test_no_server_holds_us_beyond_the_deadline(behaviour):
    started = time.perf_counter()
    error, n_requests = error_of(behaviour, read_s=10, deadline_s=0.3)
    assert error.reason == "deadline passed" and n_requests == 1
    assert time.perf_counter() - started < 4


def test_the_client_runs_where_a_loop_runs_already():
    import asyncio

    async def ask(server) -> str:
        return client_of(server).complete(HELLO)

    with judge_server(says("hi")) as server:
        assert asyncio.run(ask(server)) == "hi"


# --- streams


def stream_of(*pieces: str, end: str = "data: [DONE]\n\n") -> bytes:
    events = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    return ("".join(f"data: {json.dumps(e, ensure_ascii=False)}\n\n" for e in events) + end).encode()


def test_a_stream_is_put_together():
    sent = stream_of('{"grade"', ": ", "5}", "ö")
    for chunks in ([sent], [sent[i : i + 1] for i in range(len(sent))], [sent[:7], sent[7:90], sent[90:]]):
        with judge_server(streams(chunks)) as server:
            assert client_of(server).complete(HELLO) == '{"grade": 5}ö'


def test_a_stream_ends_at_done_even_if_the_connection_stays():
    def stays(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        handler.wfile.write(stream_of("hi"))
        handler.server.over.wait(5)

    with judge_server(stays) as server:
        assert client_of(server, deadline_s=4).complete(HELLO) == "hi"


def test_a_stream_that_breaks_off_is_tried_again():
    half = stream_of("hi", end="")
    for ends in (True, False):
        with judge_server(streams([half], ends), streams([stream_of("hello")])) as server:
            client = client_of(server)
            assert client.complete(HELLO) == "hello" and client.n_retries == 1


def test_streams_with_errors_and_limits():
    assert error_of(streams([b"data: {\n\n", b"data: [DONE]\n\n"]))[0].reason == "malformed stream"
    assert error_of(streams([b'data: {"error": "no"}\n\n']))[0].reason == "malformed stream"
    cut = b'data: {"choices": [{"delta": {"content": "x"}, "finish_reason": "length"}]}\n\ndata: [DONE]\n\n'
    assert error_of(streams([cut]))[0].reason == "reply cut at max_tokens"
    usage = b'data: {"choices": [], "usage": {"total_tokens": 3}}\n\n'
    with judge_server(streams([stream_of("hi", end=""), usage, b"data: [DONE]\n\n"])) as server:
        assert client_of(server).complete(HELLO) == "hi"


def whole(sent: bytes) -> list[str]:
    """The events of a stream that is there at once, by the standard's own words."""
    text = sent.decode("utf-8", "replace").removeprefix("\ufeff")
    events, data = [], []
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]:
        if not line:
            events += ["\n".join(data)] if data else []
            data = []
        elif line.startswith("data"):
            name, _, value = line.partition(":")
            if name == "data":
                data.append(value.removeprefix(" "))
    return events


PIECES = [
    "data: ",
    "data:",
    "data",
    "x",
    "ö",
    ": note",
    "\n",
    "\r",
    "\r\n",
    "\n\n",
    "event: e",
    "[DONE]",
    " ",
    "\ufeff",
]


@given(st.lists(st.sampled_from(PIECES), max_size=25), st.lists(st.integers(1, 6), max_size=60))
def test_events_do_not_depend_on_where_the_bytes_are_cut(pieces, sizes):
    sent = "".join(pieces).encode()
    stream, found, place = EventStream(), [], 0
    for size in [*sizes, len(sent)]:
        found += stream.feed(sent[place : place + size])
        place += size
    assert found == whole(sent)
    by_bytes = EventStream()
    assert [event for byte in sent for event in by_bytes.feed(bytes([byte]))] == whole(sent)


def test_a_line_end_may_be_cut_in_two():
    sent = b"data: x\r\ndata: y\r\n\r\n\rdata: z\r\r\n"
    assert whole(sent) == ["x\ny", "z"]
    for cut in range(len(sent) + 1):
        stream = EventStream()
        assert stream.feed(sent[:cut]) + stream.feed(b"") + stream.feed(sent[cut:]) == ["x\ny", "z"]


def test_many_small_chunks_cost_their_number_only():
    sent = b"data: x\n\n" * 20_000
    stream, started = EventStream(), time.perf_counter()
    n_events = sum(len(stream.feed(sent[i : i + 1])) for i in range(len(sent)))
    n_events += len(stream.feed(b"data: " + b"y" * 1_000_000 + b"\n\n"))
    assert n_events == 20_001 and time.perf_counter() - started < 10


# --- the cache


def test_a_reply_is_asked_for_once(tmp_path):
    cache = ReplyCache(tmp_path / "deep" / "cache")
    with judge_server(says("one"), says("two")) as server:
        client = client_of(server, cache=cache)
        assert [client.complete(HELLO) for _ in range(3)] == ["one"] * 3
        assert (client.n_requests, client.n_from_cache) == (1, 2)
        assert client_of(server, cache=cache).complete(HELLO) == "one"
        assert client.complete(HELLO, {"type": "object"}) == "two"
    (first, second) = sorted(cache.folder.iterdir())
    for path in (first, second):
        assert KEY not in path.read_text() and "Bearer" not in path.read_text()


def test_each_part_of_a_request_makes_another_name(tmp_path):
    cache = ReplyCache(tmp_path)
    request = {"url": "u", "payload": {"model": "m", "messages": HELLO, "temperature": 0}}
    others = [
        request | {"url": "v"},
        request | {"payload": request["payload"] | {"model": "n"}},
        request | {"payload": request["payload"] | {"temperature": 1}},
        request | {"payload": request["payload"] | {"messages": [*HELLO, *HELLO]}},
    ]
    assert len({cache.path(one) for one in (request, *others)}) == 5
    cache.put(request, "x\ud800")
    assert cache.get(dict(reversed(request.items()))) == "x\ud800"
    assert [cache.get(one) for one in others] == [None] * 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"reply": "five"', '"reply": "four"'),
        lambda text: text.replace('"url": "u"', '"url": "v"'),
        lambda text: "null",
        lambda text: "[" * 100_000,
        lambda text: '{"request": {}, "reply": 5, "sha256": 5}',
    ],
)
def test_a_damaged_file_is_no_file(tmp_path, damage):
    cache, request = ReplyCache(tmp_path), {"url": "u"}
    cache.put(request, "five")
    path = cache.path(request)
    path.write_text(damage(path.read_text()))
    assert cache.get(request) is None
    cache.put(request, "five")
    assert cache.get(request) == "five"


def test_bytes_that_are_no_text_and_a_folder_in_the_way_are_no_file(tmp_path):
    cache, request = ReplyCache(tmp_path), {"url": "u"}
    cache.path(request).write_bytes(b"\xff\xfe")
    assert cache.get(request) is None
    cache.path(request).unlink()
    cache.path(request).mkdir()
    assert cache.get(request) is None
    with pytest.raises(OSError):
        cache.put(request, "x")
    assert [path.name for path in tmp_path.iterdir()] == [cache.path(request).name]


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    cache = ReplyCache(tmp_path)

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        cache.put({"url": "u"}, "x")
    assert list(tmp_path.iterdir()) == []


def test_several_writers_leave_one_whole_file(tmp_path):
    cache, request = ReplyCache(tmp_path), {"url": "u"}
    replies = [str(i) * 5000 for i in range(8)]
    threads = [threading.Thread(target=cache.put, args=(request, reply)) for reply in replies]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert cache.get(request) in (None, *replies)
    assert cache.get(request) in replies and len(list(tmp_path.iterdir())) == 1


def test_errors_are_not_kept_and_a_reply_with_the_key_is_not_written(tmp_path):
    cache = ReplyCache(tmp_path)
    with judge_server(sends(b"no", 400), says(f"your key is {KEY}")) as server:
        client = client_of(server, cache=cache)
        with pytest.raises(JudgeError):
            client.complete(HELLO)
        assert KEY in client.complete(HELLO)
    assert list(tmp_path.iterdir()) == []
