"""A program in a terminal of its own, as somebody at a keyboard sees it; POSIX only."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType


class Terminal:
    """`llm` with a terminal for input and output.

    Args:
        arguments: Of the command line.
        seconds: How long `until` waits at most.
    """

    def __init__(self, arguments: Sequence[str], seconds: float = 120.0) -> None:
        import pty

        self.seconds, self.shown = seconds, ""
        self.keyboard, screen = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shared.serving.cli", *arguments],
            stdin=screen,
            stdout=screen,
            stderr=screen,
            start_new_session=True,
            preexec_fn=self._take_terminal,
            env=os.environ | {"TERM": "dumb"},
        )
        os.close(screen)

    @staticmethod
    def _take_terminal() -> None:
        """Make the terminal the one whose Ctrl-C reaches this process."""
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # tests that run in the background inherit that it is ignored

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.keyboard)

    def type(self, keys: str) -> None:
        """Press keys; `\\x03` is Ctrl-C, `\\x04` is Ctrl-D."""
        os.write(self.keyboard, keys.encode("utf-8"))

    def until(self, text: str) -> str:
        """Wait until a text is shown, and return what was shown since the last call, up to its end."""
        deadline = time.monotonic() + self.seconds
        while text not in self.shown:
            self.read(deadline, text)
        seen, _, self.shown = self.shown.partition(text)
        return seen + text

    def press_until(self, keys: str, text: str) -> None:
        """Press keys, and again every three seconds until a text is shown: between two waits nobody may listen."""
        deadline = time.monotonic() + self.seconds
        while text not in self.shown:
            self.type(keys)
            again = time.monotonic() + 3
            while text not in self.shown and time.monotonic() < again:
                self.read(deadline, text)
        self.until(text)

    def until_something(self) -> None:
        """Wait until anything is shown that no call has returned yet."""
        deadline = time.monotonic() + self.seconds
        while not self.shown:
            self.read(deadline, "anything")

    def read(self, deadline: float, wanted: str) -> None:
        """Read what is shown now; AssertionError after the deadline, or if the program has ended."""
        assert time.monotonic() < deadline, f"{wanted!r} was not shown: {self.shown[-500:]!r}"
        if select.select([self.keyboard], [], [], 0.2)[0]:
            try:
                self.shown += os.read(self.keyboard, 4096).decode("utf-8", "replace")
            except OSError:
                raise AssertionError(f"ended before {wanted!r} was shown: {self.shown[-500:]!r}") from None

    def status(self) -> int:
        """Wait for the end and return the exit status."""
        return self.process.wait(self.seconds)
