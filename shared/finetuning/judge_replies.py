"""What comes back from an OpenAI-compatible endpoint: the text of a reply, whole or streamed, and a cache of
replies.

A reply that is malformed, broken off or cut at its limit of tokens is an error, never half a text. A file
of the cache is named by the hash of the request; it appears whole or not at all, and a damaged one counts
as absent.

Left out: tool calls, several choices, and cleaning the cache up.

Follows the WHATWG's standard for server-sent events.

Explained and proven in ch07_instruction/02_evaluation.ipynb; written from there by `make promote`.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path


class JudgeError(RuntimeError):
    """No reply could be had. The message is one line and holds no key.

    Attributes:
        reason: The cause in a few words, to be counted.
        temporary: Whether another try may help.
        setting: Whether address, key or model are wrong, so that every request will fail.
        retry_after: Seconds that the server asks to wait, or None.
    """

    def __init__(
        self,
        reason: str,
        detail: str = "",
        *,
        temporary: bool = False,
        setting: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.temporary, self.setting = reason, temporary, setting
        self.retry_after = retry_after


class EventStream:
    """Reads server-sent events from bytes that are cut anywhere; only the data of the events is kept.

    Follows the standard of the WHATWG: lines end in CR, LF or both, lines that begin with a colon are comments.
    """

    def __init__(self) -> None:
        self._line, self._data = bytearray(), list[str]()
        self._after_cr = self._begun = False

    def feed(self, chunk: bytes) -> list[str]:
        """Return the data of the events that are complete with this piece of bytes."""
        events: list[str] = []
        if self._after_cr and chunk[:1] == b"\n":  # the second half of a line end
            chunk, self._after_cr = chunk[1:], False
        if not chunk:
            return events
        self._after_cr = chunk.endswith(b"\r")
        *lines, rest = re.split(rb"\r\n|\r|\n", chunk)
        for end in lines:
            self._line += end
            line = self._line.decode("utf-8", "replace")
            self._line.clear()
            if not self._begun:
                line, self._begun = line.removeprefix("\ufeff"), True
            if not line and self._data:
                events.append("\n".join(self._data))
                self._data.clear()
            name, _, value = line.partition(":")
            if name == "data":
                self._data.append(value.removeprefix(" "))
        self._line += rest
        return events


def message_from_json(body: bytes) -> str:
    """Return what the assistant says in a whole reply; JudgeError if it is none, or was cut."""
    try:
        choice = json.loads(body)["choices"][0]
        content, finished = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise JudgeError("malformed reply") from None
    return _whole(content, finished)


def message_from_events(events: list[str]) -> str:
    """Return what the assistant says in the data of a stream; JudgeError if it is malformed, broken off or cut."""
    pieces, finished = [], None
    try:
        for event in events:
            if event == "[DONE]":
                finished = finished or "stop"
                continue
            choices = json.loads(event)["choices"]
            for choice in choices[:1]:  # the last event may hold none, only counts
                pieces.append(choice.get("delta", {}).get("content") or "")
                finished = choice.get("finish_reason") or finished
        content = "".join(pieces)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise JudgeError("malformed stream") from None
    if finished is None:
        raise JudgeError("stream broken off", temporary=True)
    return _whole(content, finished)


def _whole(content: object, finished: object) -> str:
    if finished == "length":
        raise JudgeError("reply cut at max_tokens")
    if not isinstance(content, str):
        raise JudgeError("malformed reply", "no text in it")
    return content


class ReplyCache:
    """Replies in a folder, one file each, named by the hash of the request. A damaged file is no file."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, request: Mapping[str, object]) -> Path:
        """Return where the reply to a request is kept."""
        canonical = json.dumps(request, sort_keys=True, allow_nan=False)
        return self.folder / f"{hashlib.sha256(canonical.encode()).hexdigest()}.json"

    def get(self, request: Mapping[str, object]) -> str | None:
        """Return the kept reply; None if there is none, or the file is not what `put` wrote for this request."""
        try:
            kept = json.loads(self.path(request).read_text(encoding="utf-8"))
            same = kept["request"] == json.loads(json.dumps(request))
            whole = kept["sha256"] == _text_hash(kept["reply"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
        return kept["reply"] if same and whole else None

    def put(self, request: Mapping[str, object], reply: str) -> None:
        """Keep a reply; the file appears whole or not at all. Raises OSError if it cannot be written."""
        kept = {"request": request, "reply": reply, "sha256": _text_hash(reply)}
        handle, name = tempfile.mkstemp(prefix=".reply-", dir=self.folder)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(kept, file)
            os.replace(name, self.path(request))
        except BaseException:
            os.unlink(name)
            raise


def _text_hash(text: str) -> str:
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()
