"""Requests that are none, in every way we could think of, for `serve_load.py` and the tests.

Each kind must end with a status from 400 to 499, or with a connection that is closed.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from deployment.serve_client import ask


def malformed_bodies(model: str, chance: random.Random) -> Iterator[tuple[str, bytes, bytes]]:
    """Yield for ever: a kind, more lines for the head, and a body that is none."""
    good = {"model": model, "prompt": "x", "max_tokens": 1}
    text = json.dumps(good)
    fields = ("prompt", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "logprobs")
    values = (-1.5, [], {}, [[]], [None], 10**400, -(10**30), "\ud800", "x" * 5000, [[1, "a"]])
    while True:
        kind = chance.randrange(12)
        if kind == 0:
            yield "cut off", b"", text[: chance.randrange(len(text))].encode()
        elif kind == 1:
            field = chance.choice(fields)  # stream_options is wrong in any case
            body = json.dumps(good | {"stream_options": 3} | {field: chance.choice(values)})
            yield f"wrong {field}", b"", body.encode()
        elif kind == 2:
            depth = chance.choice((50_000, 200_000))
            yield "deep", b"", b'{"model":' + b"[" * depth + b"]" * chance.choice((0, depth)) + b"}"
        elif kind == 3:
            yield "not UTF-8", b"", text.replace("x", "\udcff\udcfe").encode("utf-8", "surrogateescape")
        elif kind == 4:
            word = chance.choice(("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000))
            yield "no number", b"", text.replace("1}", f'1, "temperature": {word}}}').encode()
        elif kind == 5:
            yield "no content type", b"Content-Type: text/plain\r\n", text.encode()
        elif kind == 6:
            yield "too large", b"", b'{"prompt": "' + b"x" * 1_100_000
        elif kind == 7:
            yield "noise", b"", chance.randbytes(chance.randrange(1, 300))
        elif kind == 8:
            yield (
                "no object",
                b"",
                chance.choice((b"[]", b"3", b'"x"', b"null", b"", b"\x00", b"{}", b"[{}]")),
            )
        elif kind == 9:
            yield "other encoding", b"", text.encode(chance.choice(("utf-16", "utf-32")))
        elif kind == 10:
            yield "too many", b"", json.dumps(good | {"prompt": ["x"] * 1000, "n": 16}).encode()
        else:
            yield (
                "too long",
                b"",
                json.dumps(good | {"prompt": chance.choice(("word ", "aaaaa", "ÄÖ")) * 30_000}).encode(),
            )


HEADS = (
    b"\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\nx",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n" + b"10000\r\n" + b"x" * 0x10000 + b"\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    b"GET /nothing/here HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"DELETE /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\n\r\n",
    b"GET /v1/models/%ff%00%2e%2e HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n",
)


async def send_raw(port: int, raw: bytes, *, slowly: bool = False, seconds: float = 30.0) -> str:
    """Send bytes and return how it ended: a status, "closed", or "open" if it did not end in time."""
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                if slowly:  # a few bytes at a time, for longer than anybody should wait
                    for i in range(0, len(raw), 3):
                        writer.write(raw[i : i + 3])
                        await writer.drain()
                        await asyncio.sleep(0.1)
                else:
                    writer.write(raw)
                    await writer.drain()
                line = await reader.readline()
            finally:
                writer.close()
        return line.split()[1].decode() if line.startswith(b"HTTP/") else "closed"
    except TimeoutError:
        return "open"
    except (OSError, IndexError):
        return "closed"


def malformed(port: int, model: str, n: int, seed: int = 0, patience: float = 30.0) -> dict[str, Any]:
    """Send n malformed requests, some of them slow, with good ones between; return how they ended.

    Half-open connections and slow senders (about a tenth) go on while the others come.
    """
    chance = random.Random(seed)
    bodies, url = malformed_bodies(model, chance), f"http://127.0.0.1:{port}"
    outcomes, bad = Counter[str](), []
    good_seconds: list[float] = []
    alone_seconds: list[float] = []

    async def run() -> None:
        for _ in range(3):  # good ones alone, to compare with
            started = time.perf_counter()
            await ask(url, "x", 2, model=model)
            alone_seconds.append(time.perf_counter() - started)
        lasting = []
        for number in range(n):
            choice = chance.randrange(10)
            if choice == 0:
                head = (
                    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                )
                cases = (b"", head[: chance.randrange(1, len(head))], head + b"Content-Length: 50\r\n\r\n{")
                raw = chance.choice(cases)
                lasting.append(
                    ("slow", asyncio.create_task(send_raw(port, raw, slowly=True, seconds=patience)))
                )
            elif choice < 3:
                raw = chance.choice(HEADS)
                lasting.append(
                    (raw[:60].decode("latin-1"), asyncio.create_task(send_raw(port, raw, seconds=patience)))
                )
            else:
                kind, more, body = next(bodies)
                head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                head += more or b"Content-Type: application/json\r\n"
                raw = head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
                note(kind, await send_raw(port, raw, seconds=patience))
            if number % 10 == 9:  # the next good request
                started = time.perf_counter()
                answer = await ask(url, "x", 2, model=model)
                good_seconds.append(time.perf_counter() - started)
                if not answer.complete:
                    bad.append(("good request", answer.status))
        for kind, task in lasting:
            note(kind, await task)

    def note(kind: object, how: str) -> None:
        outcomes[how] += 1
        if not (how == "closed" or how.startswith("4")):
            bad.append((kind, how))

    asyncio.run(run())
    return {
        "requests": n,
        "ended": dict(outcomes),
        "not_as_it_must_be": bad[:10],
        "good_between": len(good_seconds),
        "slowest_good_s": round(max(good_seconds), 3),
        "slowest_alone_s": round(max(alone_seconds), 3),
    }
