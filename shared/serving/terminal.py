"""What the commands of `llm` share: text in, text out, and errors of one line.

An error that a user can do something about becomes one line on standard error and an exit status: 1 for a failure, 130
for Ctrl-C. (A command line that cannot be understood is 2; that is the command line library's part.) Nothing here
imports torch, so that `llm --help` answers at once.
"""

import contextlib
import errno
import functools
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import typer

FAILED, INTERRUPTED = 1, 130
T = TypeVar("T")


class Failure(Exception):
    """What a command cannot do, in one line for the user."""


def prepare_streams() -> None:
    """Write UTF-8 whatever the locale says; refuse input that is no UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")


def complain(text: object) -> None:
    """Write one line to standard error."""
    with contextlib.suppress(OSError, ValueError):  # it may be closed, too
        print("llm:", " ".join(str(text).split()), file=sys.stderr, flush=True)


def message_of(error: BaseException) -> str:
    """Return what went wrong in a line."""
    if isinstance(error, BrokenPipeError):
        return "whoever read the output has closed it; the rest was not written"
    if isinstance(error, OSError) and is_full(error):
        return f"no space left on the device{f': {error.filename}' if error.filename else ''}"
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "not enough memory for this model; try --dtype bfloat16 or a smaller one"
    if isinstance(error, Failure | ValueError | TypeError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def is_full(error: OSError) -> bool:
    """Return whether a disk is full, as the system, safetensors and numpy say it."""
    said = str(error)
    return (
        error.errno == errno.ENOSPC
        or "No space left" in said
        or (" requested and " in said and "written" in said)
    )


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose errors are one line and an exit status. LLM_TRACEBACK=1 lets them through as they are."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
            sys.stdout.flush()  # a full disk shows here, not when Python ends
        except KeyboardInterrupt:
            leave(INTERRUPTED)
        except (typer.Exit, typer.TyperException):
            raise
        except Exception as error:
            if os.environ.get("LLM_TRACEBACK") and not isinstance(error, BrokenPipeError):
                raise
            if type(error).__module__.startswith("typer"):  # a usage error
                raise
            complain(message_of(error))
            leave(FAILED)

    return run


def leave(status: int) -> None:
    """End with a status; what standard output cannot take any more is dropped without a word."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise typer.Exit(status)


def write(text: str, end: str = "\n") -> None:
    """Write to standard output at once."""
    print(text, end=end, flush=True)


def write_json(value: object) -> None:
    """Write a value as one line of JSON."""
    write(json.dumps(value, ensure_ascii=False))


def check_utf8(name: str, text: str) -> str:
    """Return a text of the command line; ValueError if its bytes were no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Failure(f"{name} must be UTF-8, got a wrong byte at character {error.start}") from None
    return text


def input_bytes() -> Iterator[bytes]:
    """Yield the lines of standard input. Raises Failure if it is a terminal, where nobody knows that we wait."""
    if sys.stdin is None or sys.stdin.isatty():
        raise Failure("give a text as an argument, or on standard input")
    yield from sys.stdin.buffer


def read_input() -> str:
    """Return all of standard input, without a line break at its end."""
    return decoded(b"".join(input_bytes()), "standard input").removesuffix("\n").removesuffix("\r")


def decoded(raw: bytes, name: str) -> str:
    """Return bytes as text; Failure that names the first byte which is no UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Failure(
            f"{name} must be UTF-8, got byte 0x{raw[error.start]:02x} at place {error.start}"
        ) from None


def input_texts(text: str | None, *, as_json: bool, field: str) -> Iterator[dict[str, Any]]:
    """Yield objects with a text under `field`: the argument's, or one for each line of standard input.

    Args:
        text: The argument; None reads standard input.
        as_json: A line is JSON, an object with the field or a text; else it is the text. Empty lines are left out.
        field: Its name.

    Raises:
        Failure: A line is no UTF-8 or no such JSON; it says which.
    """
    if text is not None:
        yield {field: check_utf8("the text", text)}
        return
    for number, raw in enumerate(input_bytes(), 1):
        line = decoded(raw, f"line {number}").strip()
        if not line:
            continue
        if not as_json:
            yield {field: line}
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise Failure(f"line {number} is no JSON: {error}") from None
        value = {field: value} if isinstance(value, str) else value
        if not isinstance(value, dict) or not isinstance(value.get(field), str):
            raise Failure(f'line {number} must be a text or an object with "{field}", got {line:.60}')
        yield value


def progress(items: Iterable[T], what: str) -> Iterable[T]:
    """Return the items with a bar on standard error, where that is a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=what, file=sys.stderr, leave=False, disable=not sys.stderr.isatty())


class Interruptible:
    """Inside this context Ctrl-C sets `stopped`; only a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.stopped = False

    def __enter__(self) -> "Interruptible":
        self._before = signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _stop(self, *_: object) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
