"""Replies in OpenAI's form: one object at the end, or server-sent events, a piece at a time.

`ReplyForm` knows what the two kinds of requests, completions and chat, write differently. `EventStream` is a reply
that is sent while it is written; it notices at once when its reader leaves, also one who waits in the queue and has
got nothing yet.
"""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shared.serving.errors import ApiError
from shared.serving.pieces import Piece, TokenInfo
from shared.serving.worker import Job, Worker

LOWEST = -9999.0  # in place of minus infinity, which JSON does not have
TIMEOUT = "timeout"
QUIET_S = (
    15.0  # after so long without a piece a comment is sent, so that nobody on the way ends the connection
)


def shown(raw: bytes) -> str:
    """Return a token's bytes as text; bytes that are no text alone are written out."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@dataclass(frozen=True)
class ReplyForm:
    """How replies of one request are written.

    Attributes:
        chat: Messages, or plain continuations.
        model: The name for the reply.
        logprobs: Whether probabilities are told.
        usage_in_stream: Whether the last event of a stream says how many tokens it took.
        id: Of the reply.
        created: When, in seconds since 1970.
    """

    chat: bool
    model: str
    logprobs: bool
    usage_in_stream: bool
    id: str
    created: int

    @classmethod
    def new(cls, chat: bool, model: str, logprobs: bool, usage_in_stream: bool) -> "ReplyForm":
        """Return a form with a new id."""
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        return cls(chat, model, logprobs, usage_in_stream, name, int(time.time()))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, infos: Sequence[TokenInfo]) -> dict[str, Any] | None:
        """Return the probabilities of tokens; None where they are not wanted."""
        if not self.logprobs:
            return None
        bounded = lambda value: max(value, LOWEST)
        if self.chat:
            entry = lambda raw, value: {"token": shown(raw), "logprob": bounded(value), "bytes": list(raw)}
            content = [
                entry(info.raw, info.logprob) | {"top_logprobs": [entry(*pair) for pair in info.top]}
                for info in infos
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [shown(info.raw) for info in infos],
            "token_logprobs": [bounded(info.logprob) for info in infos],
            "top_logprobs": [{shown(raw): bounded(value) for raw, value in info.top} for info in infos],
            "text_offset": [info.offset for info in infos],
        }

    def whole(self, pieces: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the reply as one object; one piece for each sequence."""
        choices = []
        for piece in sorted(pieces, key=lambda piece: piece.index):
            choice: dict[str, Any] = {"index": piece.index}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": piece.text, "refusal": None}
            else:
                choice["text"] = piece.text
            choices.append(
                choice | {"logprobs": self._logprobs(piece.infos), "finish_reason": piece.finish_reason}
            )
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        chunk = self._head("chat.completion.chunk" if self.chat else "text_completion") | {"choices": choices}
        if self.usage_in_stream:
            chunk["usage"] = usage
        return event(chunk)

    def first(self, n: int) -> bytes:
        """Return the events that begin a stream: in a chat, who speaks."""
        if not self.chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        empty = {"delta": delta, "logprobs": None, "finish_reason": None}
        return b"".join(self._chunk([{"index": index} | empty]) for index in range(n))

    def next(self, piece: Piece) -> bytes:
        """Return the event for a piece; the last one of a chat's sequence has an event of its own for how it ended."""
        logprobs, reason = self._logprobs(piece.infos), piece.finish_reason
        if not self.chat:
            choice = {"index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": reason}
            return self._chunk([choice])
        written = b""
        if piece.text or piece.infos:
            delta = {"index": piece.index, "delta": {"content": piece.text}, "logprobs": logprobs}
            written = self._chunk([delta | {"finish_reason": None}])
        if reason:
            written += self._chunk(
                [{"index": piece.index, "delta": {}, "logprobs": None, "finish_reason": reason}]
            )
        return written

    def last(self, usage: dict[str, Any]) -> bytes:
        """Return the events that end a stream."""
        counted = self._chunk([], usage) if self.usage_in_stream else b""
        return counted + b"data: [DONE]\n\n"


def event(value: object) -> bytes:
    """Return a server-sent event that holds a JSON value."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage_of(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return how many tokens a request took; a prompt counts once, however many continuations it has."""
    prompts = {id(job.prompt): job for job in jobs}.values()
    n_prompt, n_new = sum(len(job.prompt) for job in prompts), sum(job.n_new for job in jobs)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_new,
        "total_tokens": n_prompt + n_new,
        "prompt_tokens_details": {"cached_tokens": sum(job.n_shared for job in prompts)},
    }


async def until_gone(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


@dataclass(frozen=True)
class Deadline:
    """When a reply must be complete.

    Attributes:
        at: Of `time.monotonic`.
        is_own: Whether the client has set it, and not the server.
    """

    at: float
    is_own: bool

    def error(self) -> ApiError:
        """Return the error for a reply that was not complete in time: 408 where the client allowed less than we."""
        status = 408 if self.is_own else 504
        return ApiError(status, "the reply was not complete in time", code=TIMEOUT)


async def attended(receive: Receive, work: Callable[[], Any], deadline: Deadline) -> Any:
    """Return the result of some work, which is cancelled when its client leaves or its time is over.

    Raises:
        ClientDisconnect: The client has left.
        ApiError: The deadline has passed (408, 504).
    """
    task, gone = asyncio.ensure_future(work()), asyncio.ensure_future(until_gone(receive))
    try:
        seconds = deadline.at - time.monotonic()
        await asyncio.wait({task, gone}, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientDisconnect
        raise deadline.error()
    finally:
        for each in (task, gone):
            each.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def collect(worker: Worker, jobs: Sequence[Job]) -> list[Piece]:
    """Submit sequences and return what they became. Raises the ApiError of the first that fails."""
    worker.submit(jobs)
    pieces = []
    for _ in jobs:
        piece = await jobs[0].pieces.get()
        if piece.error is not None:
            raise piece.error
        pieces.append(piece)
    return pieces


async def events_of(form: ReplyForm, jobs: Sequence[Job]) -> AsyncIterator[bytes]:
    """Yield the events of sequences that were submitted. Raises the ApiError of the first that fails."""
    pieces, open_ = jobs[0].pieces, len(jobs)
    if first := form.first(len(jobs)):
        yield first
    while open_:
        try:
            # Not `wait_for`: that of Python 3.11 may swallow that we are cancelled.
            async with asyncio.timeout(QUIET_S):
                piece = await pieces.get()
        except TimeoutError:
            yield b": still here\n\n"
            continue
        # What has come in the meantime goes out together.
        ready = [piece]
        while not pieces.empty():
            ready.append(pieces.get_nowait())
        written = b""
        for piece in ready:
            if piece.error is not None:
                raise piece.error
            written += form.next(piece)
            open_ -= piece.finish_reason is not None
        yield written
    yield form.last(usage_of(jobs))


class EventStream(Response):
    """A reply of server-sent events. It ends when its reader leaves, or with an event that says what went wrong.

    Args:
        events: What is sent.
        deadline: When it must be complete.
        on_end: Called at the end, whatever it is: "done", "left", "deadline" or "failed".
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], deadline: Deadline, on_end: Callable[[str], None]
    ) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.deadline, self.on_end = events, deadline, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        started = False

        async def write() -> None:
            nonlocal started
            started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for written in self.events:
                await send({"type": "http.response.body", "body": written, "more_body": True})

        how, last = "done", b""
        try:
            await attended(receive, write, self.deadline)
        except ClientDisconnect:
            how = "left"
            return
        except ApiError as error:
            how, last = "deadline" if error.code == TIMEOUT else "failed", event(error.body())
        except BaseException:
            how = "failed"
            raise
        finally:
            await self.events.aclose()  # type: ignore[attr-defined]
            self.on_end(how)
        if not started:  # the time was over before it began
            await self.deadline.error().response()(scope, receive, send)
            return
        await send({"type": "http.response.body", "body": last, "more_body": False})
