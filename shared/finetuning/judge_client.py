"""Asks an OpenAI-compatible endpoint for replies: with tries and waits, time-outs, a deadline, a limit of
bytes, a cache.

The endpoint comes from `LLM_JUDGE_URL`, `LLM_JUDGE_MODEL` and `LLM_JUDGE_KEY`. The key is sent to the
address only, not after a redirect, and stands in no error, no cache and no display. `Retry-After` is
obeyed up to a limit.

Left out: several requests at a time, and endpoints with other protocols.

Explained and proven in ch07_instruction/02_evaluation.ipynb; written from there by `make promote`.
"""

import asyncio
import functools
import ipaddress
import json
import math
import os
import random
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx

from shared.checks import check_text, require
from shared.finetuning.judge_replies import (
    EventStream,
    JudgeError,
    ReplyCache,
    message_from_events,
    message_from_json,
)

DEFAULT_URL, DEFAULT_MODEL = "http://localhost:11434/v1", "llama3.2"


@dataclass(frozen=True)
class Endpoint:
    """Where a judge is asked: an address that speaks OpenAI's chat protocol.

    Attributes:
        url: Up to the version, such as https://api.example.com/v1; without password, query and fragment.
        model: The name under which the server knows the model.
        key: Sent as a bearer token; never shown. Only over https, or to this machine.
        options: More fields of the request.

    Raises:
        ValueError: The address, the model's name or the key cannot be used; the message does not show address or key.
    """

    url: str = DEFAULT_URL
    model: str = DEFAULT_MODEL
    key: str = field(default="", repr=False)
    options: Mapping[str, object] = field(
        default_factory=lambda: {"temperature": 0, "seed": 0, "max_tokens": 512}
    )

    def __post_init__(self) -> None:
        """Check the parts; see the class."""
        check_text("url", self.url)
        check_text("model", self.model)
        try:
            parts = urlsplit(self.url)
            plain = parts.username is None and not parts.query and not parts.fragment and parts.port != 0
        except ValueError:
            plain = False
        if not plain or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url must be http(s)://host[:port]/path, without user, query and fragment")
        require("model", self.model, bool(self.model.strip()), "the name of a model")
        if any(not "!" <= letter <= "~" for letter in self.key):
            raise ValueError("key must be printable ASCII without spaces")
        if self.key and parts.scheme == "http" and not self.is_local:
            raise ValueError("url must be https where a key is sent to another machine")

    @property
    def is_local(self) -> bool:
        """Whether the address is this machine."""
        host = urlsplit(self.url).hostname or ""
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class Limits:
    """How long and how much: nobody may hold us for ever.

    Attributes:
        connect_s: Seconds for the connection.
        read_s: Seconds without a single byte.
        deadline_s: Seconds for one reply, all tries and waits together.
        max_bytes: Of a reply.
        max_tries: Of one request.
        max_wait_s: Longest wait before another try; a server that asks for more is not asked again.
    """

    connect_s: float = 5.0
    read_s: float = 60.0
    deadline_s: float = 180.0
    max_bytes: int = 1_000_000
    max_tries: int = 4
    max_wait_s: float = 30.0

    def __post_init__(self) -> None:
        """Refuse what is not a number above 0 (ValueError)."""
        for name, value in vars(self).items():
            require(name, value, 0 < value < math.inf, "above 0 and finite")


def endpoint_from_environment() -> Endpoint:
    """Return the endpoint of `LLM_JUDGE_URL`, `LLM_JUDGE_MODEL` and `LLM_JUDGE_KEY`; without them Ollama's own.

    Raises ValueError as `Endpoint` does.
    """
    get = os.environ.get
    return Endpoint(
        get("LLM_JUDGE_URL") or DEFAULT_URL,
        get("LLM_JUDGE_MODEL") or DEFAULT_MODEL,
        get("LLM_JUDGE_KEY") or "",
    )


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Return the trusted certificates, read once."""
    return httpx.create_ssl_context()


async def _exchange(endpoint: Endpoint, payload: Mapping[str, object], limits: Limits, seconds: float) -> str:
    """Send one request and return the reply's text, in at most so many seconds. Errors as JudgeError."""
    headers = {
        "Accept": "application/json, text/event-stream",
        "Accept-Encoding": "identity",
        "Content-Type": "application/json",
    }
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    options = {
        "timeout": httpx.Timeout(limits.read_s, connect=limits.connect_s),
        "follow_redirects": False,
        "trust_env": not endpoint.is_local,  # a proxy is no way to this machine
        "verify": _certificates(),
    }
    url = f"{endpoint.url.rstrip('/')}/chat/completions"
    body = json.dumps(payload, allow_nan=False).encode()
    try:
        async with (
            asyncio.timeout(seconds),
            httpx.AsyncClient(**options) as client,
            client.stream("POST", url, content=body, headers=headers) as response,
        ):
            return await _read(response, endpoint, limits.max_bytes)
    except TimeoutError:
        raise JudgeError("deadline passed", "the reply was not complete in time") from None
    except httpx.TimeoutException as error:
        raise JudgeError("time-out", type(error).__name__, temporary=True) from None
    except httpx.ConnectError:
        raise JudgeError("no connection", urlsplit(endpoint.url).hostname or "", temporary=True) from None
    except httpx.TransportError as error:
        raise JudgeError("connection broken", type(error).__name__, temporary=True) from None


async def _read(response: httpx.Response, endpoint: Endpoint, max_bytes: int) -> str:
    """Return the text of a reply, read piece by piece up to the limit."""
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_stream = response.status_code == 200 and kind == "text/event-stream"
    if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise JudgeError("compressed reply", "which was not asked for")
    body, stream, events = bytearray(), EventStream(), list[str]()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise JudgeError("reply too large", f"more than {max_bytes:,} bytes")
        if is_stream:
            new = stream.feed(chunk)
            events += new
            if "[DONE]" in new:
                break
    if response.status_code != 200:
        raise _refusal(response, body.decode("utf-8", "replace"), endpoint.key)
    return message_from_events(events) if is_stream else message_from_json(bytes(body))


TEMPORARY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
WRONG_SETTING = frozenset({401, 403, 404, 405})


def _refusal(response: httpx.Response, body: str, key: str) -> JudgeError:
    """Return the error for a status other than 200."""
    status = response.status_code
    if 300 <= status < 400:
        return JudgeError(f"status {status}", "the address redirects, which is not followed", setting=True)
    for secret in {key, json.dumps(key)[1:-1]} - {""}:
        body = body.replace(secret, "***")
    detail = " ".join(body.split())[:200]
    return JudgeError(
        f"status {status}",
        detail,
        temporary=status in TEMPORARY,
        setting=status in WRONG_SETTING,
        retry_after=retry_after_seconds(response.headers.get("retry-after", "")),
    )


def retry_after_seconds(value: str, now: float | None = None) -> float | None:
    """Return the seconds that a header `Retry-After` asks for: a whole number, or a date less now; else None."""
    if value.strip().isascii() and value.strip().isdecimal():
        return float(value[:12])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now))
    except (ValueError, TypeError, OverflowError):
        return None


class ChatClient:
    """Asks an endpoint for replies, with tries, waits, limits and a cache; one request at a time.

    Args:
        endpoint: Where to ask.
        limits: How long and how much.
        cache: Replies that are known already; None keeps none.
        sleep, clock, uniform: Of the waits; a test may put its own.

    Attributes:
        n_requests, n_retries, n_from_cache: What happened so far.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        limits: Limits | None = None,
        *,
        cache: "ReplyCache | None" = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self.endpoint, self.limits, self.cache = endpoint, limits or Limits(), cache
        self._sleep, self._clock, self._uniform = sleep, clock, uniform
        self.n_requests = self.n_retries = self.n_from_cache = 0

    def _wait(self, n_failed: int, error: JudgeError) -> float:
        """Return how long to wait after so many failures: doubling, half of it random, at least what is asked."""
        longest = min(self.limits.max_wait_s, 0.5 * 2**n_failed)
        return max(longest * (0.5 + 0.5 * self._uniform()), error.retry_after or 0.0)

    def _ask(self, payload: Mapping[str, object]) -> str:
        """Return the reply to a request after as many tries as it needs and may have."""
        end = self._clock() + self.limits.deadline_s
        for n_failed in range(1, self.limits.max_tries + 1):
            self.n_requests += 1
            try:
                return _run(_exchange(self.endpoint, payload, self.limits, end - self._clock()))
            except JudgeError as error:
                wait = self._wait(n_failed, error)
                patient = wait <= self.limits.max_wait_s and self._clock() + wait < end
                if not error.temporary or n_failed == self.limits.max_tries or not patient:
                    raise
            self.n_retries += 1
            self._sleep(wait)
        raise AssertionError("unreachable")

    def complete(
        self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, object] | None = None
    ) -> str:
        """Return the reply to messages, from the cache or from the endpoint; with a schema that it should fit.

        What was cached is what the judge said, whether or not anybody could use it: a better parser need not ask again.

        Raises:
            JudgeError: No reply could be had.
        """
        payload = {"model": self.endpoint.model, "messages": [dict(m) for m in messages]}
        payload |= self.endpoint.options
        if schema is not None:
            form = {"name": "verdict", "strict": True, "schema": schema}
            payload["response_format"] = {"type": "json_schema", "json_schema": form}
        request = {"url": self.endpoint.url, "payload": payload}
        if self.cache is not None and (reply := self.cache.get(request)) is not None:
            self.n_from_cache += 1
            return reply
        reply = self._ask(payload)
        # A reply that repeats the key is not written anywhere.
        if self.cache is not None and not (self.endpoint.key and self.endpoint.key in reply):
            self.cache.put(request, reply)
        return reply


def _run(coroutine: "asyncio.Coroutine[object, object, str]") -> str:
    """Run an asynchronous function to its end, in a thread of its own: a notebook's thread has a loop already."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()
