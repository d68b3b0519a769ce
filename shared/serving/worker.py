"""One thread computes; the event loop, in another thread, talks to the clients.

A model's step takes tens of milliseconds, in which an event loop that computed itself could answer nobody. So a
`Worker` owns the engine in a thread of its own. Sequences come to it through a list under a lock; what they have
become goes back with one call into the loop for each step, however many sequences there are. Between two steps it
computes small tasks (the vector of a text), one at a time, so that they do not hold up the texts that are being
written for longer than a step.

The queue is bounded: `submit` refuses what has no place, and the caller is told when to come again.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from shared.generation.batching import BatchEngine, Event, Request
from shared.generation.options import GenerationOptions
from shared.serving.errors import ApiError
from shared.serving.logs import log
from shared.serving.metrics import Metrics
from shared.serving.pieces import Piece, TextWriter

T = TypeVar("T")
MOST_CALLS = 64  # small tasks that may wait


@dataclass(eq=False)
class Job:
    """One continuation that is wanted, and where its pieces go.

    Attributes:
        index: Which one of its request.
        prompt: Ids.
        options: How tokens are chosen.
        stop_ids: Ids that end it.
        writer: Turns its tokens into text.
        pieces: Filled in the event loop; one queue for all sequences of a request.
        seed: Of its random choices.
        n_logprobs: How many of the most probable tokens are told; None tells no probability.
        in_pieces: Whether pieces are wanted while it is written, or one at the end.
    """

    index: int
    prompt: Sequence[int]
    options: GenerationOptions
    stop_ids: frozenset[int]
    writer: TextWriter
    pieces: "asyncio.Queue[Piece]"
    seed: int | None = None
    n_logprobs: int | None = None
    in_pieces: bool = True
    n_new: int = 0
    n_shared: int = 0
    submitted: float = 0.0  # when; 0 before
    newest: float = 0.0  # when its newest token came
    is_over: bool = False
    request: Request | None = None
    kept: Piece | None = field(default=None)


class Worker:
    """Steps an engine in a thread of its own.

    Args:
        engine: Nobody else may touch it.
        max_running: Sequences that the engine runs at a time.
        max_waiting: Sequences that may wait for a place; more are refused.
        metrics: Where to count.
        threads: How many threads a step computes with; None is torch's default.

    Attributes:
        n_open: Sequences that run or wait.
        n_failures: Steps that failed, since the last one that did not.
    """

    def __init__(
        self,
        engine: BatchEngine,
        max_running: int,
        max_waiting: int,
        metrics: Metrics,
        threads: int | None = None,
    ) -> None:
        self.engine, self.max_running, self.max_open = engine, max_running, max_running + max_waiting
        self.metrics, self.threads = metrics, threads
        self.n_open = self.n_failures = 0
        self._jobs: dict[Request, Job] = {}
        self._inbox: deque[tuple[str, Job]] = deque()
        self._calls: deque[tuple[Callable[[], Any], asyncio.Future]] = deque()
        self._ended: deque[float] = deque(maxlen=64)  # when sequences ended, for `retry_after`
        self._condition = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin; pieces go to this loop."""
        self._loop = loop
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End after the step that is being computed; what is open gets no more pieces."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let sequences wait for a place, all or none. Raises ApiError (429) if too many wait already."""
        with self._condition:
            if self.n_open + len(jobs) > self.max_open:
                self.metrics.refused.inc()
                raise ApiError(
                    429,
                    "too many requests are waiting; come again later",
                    code="queue_full",
                    headers={"Retry-After": str(self._retry_after())},
                )
            self.n_open += len(jobs)
            now = time.monotonic()
            for job in jobs:
                job.submitted = now
                self._inbox.append(("submit", job))
            self._condition.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End sequences for which nobody waits any more; those that have ended, or were refused, are left alone."""
        with self._condition:
            self._inbox.extend(("cancel", job) for job in jobs if job.submitted and not job.is_over)
            self._condition.notify()

    async def call(self, function: Callable[[], T]) -> T:
        """Compute a small task between two steps. Raises what it raises, or ApiError (429) if too many wait."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._condition:
            if len(self._calls) >= MOST_CALLS:
                self.metrics.refused.inc()
                raise ApiError(
                    429, "too many requests are waiting; come again later", headers={"Retry-After": "1"}
                )
            self._calls.append((function, future))
            self._condition.notify()
        return await future

    def _retry_after(self) -> int:
        """Return in how many seconds a place may be free: about as long as the last few took to become so."""
        if len(self._ended) < 2:
            return 1
        seconds_each = (time.monotonic() - self._ended[0]) / len(self._ended)
        return max(1, min(60, round(seconds_each * max(1, self.n_open - self.max_running))))

    def _run(self) -> None:
        """Take what has come, compute a step, hand out what it brought; sleep where there is nothing to do."""
        try:
            if self.threads is not None:
                torch.set_num_threads(self.threads)  # of this thread alone
            while True:
                with self._condition:
                    while not (self._inbox or self._calls or self._jobs or self._stopping):
                        self._condition.wait()
                    if self._stopping:
                        return
                    inbox = [self._inbox.popleft() for _ in range(len(self._inbox))]
                    call = self._calls.popleft() if self._calls else None
                given: list[tuple[Job, Piece]] = []  # what goes back to the loop
                for what, job in inbox:
                    self._take(what, job, given)
                if call is not None:
                    self._compute(*call)
                if self._jobs:
                    self._step(given)
                self._hand_out(given)
        except BaseException:
            log("the engine's thread has ended", logging.CRITICAL, exc_info=True)
            raise

    def _take(self, what: str, job: Job, given: list[tuple[Job, Piece]]) -> None:
        """Submit a sequence to the engine, or cancel it."""
        if what == "cancel":
            if not job.is_over:
                if job.request is not None:
                    self.engine.cancel(job.request)
                self._end(job, "cancelled")
            return
        try:
            job.request = self.engine.submit(
                job.prompt,
                job.options,
                max_new_tokens=job.options.max_new_tokens,
                stop_ids=job.stop_ids,
                seed=job.seed,
                n_logprobs=job.n_logprobs,
            )
        except ValueError as error:
            given.append((job, Piece(job.index, error=ApiError(400, str(error)))))
            self._end(job, "refused")
        else:
            self._jobs[job.request] = job
            self.metrics.prompt_tokens.inc(len(job.prompt))

    def _step(self, given: list[tuple[Job, Piece]]) -> None:
        """Compute one step. An error in it ends all that ran; what waited is tried next."""
        started = time.monotonic()
        try:
            events = self.engine.step()
        except Exception:
            log("a step has failed", logging.ERROR, exc_info=True)
            self.metrics.failed_steps.inc()
            self.n_failures += 1
            running = [job for request, job in self._jobs.items() if request.state == "running"]
            for job in running or list(self._jobs.values()):
                assert job.request is not None
                with contextlib.suppress(Exception):
                    self.engine.cancel(job.request)
                given.append((job, Piece(job.index, error=ApiError(500, "the computation failed"))))
                self._end(job, "failed")
            return
        now, self.n_failures = time.monotonic(), 0
        self.metrics.step_seconds.observe(now - started)
        if events:
            self.metrics.batch_size.observe(len(events))
        for event in events:
            found = self._jobs.get(event.request)
            if found is not None:
                given.append((found, self._piece(found, event, now)))

    def _piece(self, job: Job, event: Event, now: float) -> Piece:
        """Return what an event of the engine means for the text."""
        piece = Piece(job.index, finish_reason=event.finish_reason)
        if event.token is not None:
            job.n_new += 1
            self.metrics.new_tokens.inc()
            if job.newest:
                self.metrics.between_tokens.observe(now - job.newest)
            else:
                self.metrics.first_token.observe(now - job.submitted)
            job.newest = now
            info = None if event.logprob is None else (event.logprob, event.top_logprobs or {})
            piece.text, piece.infos = job.writer.feed(event.token, info)
            if job.writer.stopped:
                self.engine.cancel(event.request)
                piece.finish_reason = job.writer.reason
        if event.finish_reason == "error":
            piece = Piece(job.index, error=ApiError(500, "the model's numbers overflowed for this text"))
            self._end(job, "failed")
        elif piece.finish_reason is not None:
            if not job.writer.stopped:
                text, infos = job.writer.end()
                piece.text, piece.infos = piece.text + text, piece.infos + infos
                piece.finish_reason = job.writer.reason if job.writer.stopped else piece.finish_reason
            job.n_shared = event.request.n_shared
            self._end(job, piece.finish_reason)
        return piece

    def _end(self, job: Job, reason: str) -> None:
        """Forget a sequence."""
        job.is_over = True
        if job.request is not None:
            self._jobs.pop(job.request, None)
        with self._condition:
            self.n_open -= 1
            self._ended.append(time.monotonic())
        self.metrics.sequences.labels(reason).inc()

    def _compute(self, function: Callable[[], Any], future: asyncio.Future) -> None:
        """Compute a small task, unless nobody waits for it any more."""
        if future.cancelled():
            return
        try:
            result, error = function(), None
        except Exception as caught:
            result, error = None, caught

        def settle() -> None:
            if not future.done():
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)

        self._in_loop(settle)

    def _hand_out(self, given: Sequence[tuple[Job, Piece]]) -> None:
        """Put the pieces where their requests wait for them, with one call into the loop."""
        ready: list[tuple[Job, Piece]] = []
        for job, piece in given:
            if job.in_pieces:
                if piece.text or piece.infos or piece.finish_reason or piece.error:
                    ready.append((job, piece))
                continue
            # Who wants all at the end is not woken for each token.
            if job.kept is None:
                job.kept = piece
            else:
                job.kept.add(piece)
            if job.is_over:
                ready.append((job, job.kept))

        def put() -> None:
            for job, piece in ready:
                job.pieces.put_nowait(piece)

        if ready:
            self._in_loop(put)

    def _in_loop(self, function: Callable[[], Any]) -> None:
        """Run something in the event loop, if that is still there."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # closed: nobody waits any more
            self._loop.call_soon_threadsafe(function)
