"""`llm serve` in a process of its own, and a client for it that costs little: what `serve_load.py` measures with.

The client reads server-sent events from a plain connection, since a comfortable one would take from two cores what the
server needs.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2, TALES = "smollm2-135m-instruct", "tales-3m"
BEGINNINGS = (
    "The old mill",
    "A crow",
    "In the harbour",
    "My sister",
    "At noon",
    "Snow",
    "The baker",
    "Long ago",
)
ENDINGS = (
    "was asked",
    "found a letter",
    "walked to the sea",
    "counted the lamps",
    "said that",
    "woke up because",
)


def prompts(n: int) -> list[str]:
    """Return n different beginnings of texts."""
    return [f"{BEGINNINGS[i % 8]} {ENDINGS[i // 8 % 6]}{f' {i}' if i >= 48 else ''}" for i in range(n)]


class Served:
    """`llm serve` in a process of its own, on a free port of this machine; it ends with the context.

    Args:
        model: A name or a file.
        options: More of the command line.

    Attributes:
        url: Its address.
        seconds: From the start of the process until it was ready.
        log: Its lines.
    """

    def __init__(self, model: str, *options: str, environment: dict[str, str] | None = None) -> None:
        self.model, self.log, self.url = Path(model).stem if "/" in model else model, [], ""
        command = [sys.executable, "-m", "shared.serving.cli", "serve", model, "--port", "0", *options]
        started, listening = time.monotonic(), threading.Event()
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

        def read() -> None:
            assert self.process.stderr is not None
            for line in self.process.stderr:
                self.log.append(line)
                if '"event": "listening"' in line:
                    self.url = json.loads(line)["url"]
                    listening.set()
            listening.set()

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()
        if not listening.wait(120) or not self.url:
            self.process.kill()
            raise RuntimeError(f"the server did not start: {''.join(self.log)}")
        self.seconds = time.monotonic() - started

    @property
    def port(self) -> int:
        """Its port."""
        return int(self.url.rpartition(":")[2])

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(10)

    def stop(self) -> int:
        """Ask it to end and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(120)
        self._reader.join(10)
        return status


def metrics(url: str) -> dict[str, float]:
    """Return the numbers of `/metrics` that have no labels."""
    page = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", page, re.M)}


@dataclass
class Answer:
    """What came of a request.

    Attributes:
        status: Of HTTP; 0 if the connection ended before one came.
        text: All that was written.
        n_tokens: As the server counts them, 0 if it did not say.
        complete: Whether the reply came to its end; `broken` says that we broke it off ourselves.
        times: When each piece came, in seconds from the start.
    """

    status: int = 0
    text: str = ""
    n_tokens: int = 0
    complete: bool = False
    broken: bool = False
    times: list[float] = field(default_factory=list)


async def ask(
    url: str,
    prompt: str,
    max_tokens: int,
    *,
    model: str,
    break_after: int | None = None,
    headers: str = "",
    **more: object,
) -> Answer:
    """Send one request for a stream of text and read it, up to its end or for so many pieces."""
    host, port = url.removeprefix("http://").split(":")
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}} | more
    payload = json.dumps(body).encode()
    answer, started = Answer(), time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return answer
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(payload)}\r\nConnection: close\r\n{headers}\r\n"
        writer.write(head.encode() + payload)
        if break_after == 0:
            answer.broken = True
            return answer
        answer.status = int((await reader.readline()).split()[1] or 0)
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                answer.complete = True
                break
            event = json.loads(line[6:])
            if usage := event.get("usage"):
                answer.n_tokens = usage["completion_tokens"]
            for choice in event.get("choices", ()):
                answer.text += choice["text"]
                answer.times.append(time.perf_counter() - started)
            if break_after is not None and len(answer.times) >= break_after:
                answer.broken = True
                break
    except (OSError, IndexError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()
    return answer


async def together(n_at_once: int, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run tasks, so many at once; return their results in order."""
    results: list[Any] = [None] * len(tasks)
    left = iter(enumerate(tasks))

    async def work() -> None:
        for place, task in left:
            results[place] = await task()

    await asyncio.gather(*(work() for _ in range(n_at_once)))
    return results
