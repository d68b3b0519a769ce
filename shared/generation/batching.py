"""Continuous batching: many requests over one model and one cache; they join and leave between two steps.

`BatchEngine.submit` queues a prompt, `step` runs the model once for everybody, `cancel` ends a request.
Long prompts are read in pieces, equal beginnings are computed once, and each text is what its prompt
becomes alone.

Left out: text and stop strings (`shared.generation.streaming`), HTTP (`shared.serving`), priorities, and
several models at once.

Follows Yu et al. (2022, "Orca") on joining and leaving, Agrawal et al. (2024, "Sarathi-Serve") on prompts
in pieces.

Explained and proven in deployment/03_web_service.ipynb; written from there by `make promote`.
"""

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from shared.checks import check_sizes, require, whole_number
from shared.generation.batching_pass import BatchedPass, CacheRows, Piece
from shared.generation.engine import Processor, apply_processors, check_ids, choose_tokens, evaluating
from shared.generation.options import GenerationOptions
from shared.generation.sampling import MinP, Temperature, TopK, TopP, Typical, as_float32, check_number
from shared.model.gpt import GPTModel


@dataclass(eq=False)
class Request:
    """A prompt that is being continued, and how far it is.

    Attributes:
        prompt, options, max_new_tokens, stop_ids, n_logprobs: As `BatchEngine.submit` took them.
        generated: The new ids so far; a stop id is not among them.
        state: "waiting", "running" or "done".
        finish_reason: "stop", "length", "cancelled", or "error" where the model's logits were no numbers; None before.
        n_shared: How many tokens of the prompt had been computed already, for another text.
    """

    prompt: list[int]
    options: GenerationOptions
    max_new_tokens: int
    stop_ids: frozenset[int]
    n_logprobs: int | None
    processors: tuple[Processor, ...] = field(repr=False)
    uniforms: Tensor | None = field(
        repr=False
    )  # a random number for each new token; None: the most probable one
    generated: list[int] = field(default_factory=list)
    state: str = "waiting"
    finish_reason: str | None = None
    n_shared: int = 0
    row: int | None = None


@dataclass(frozen=True)
class Event:
    """What a step did for one request.

    Attributes:
        request: The request.
        token: The new id; None where the request ended without one.
        logprob: Logarithm of the token's probability before temperature and cuts, if `n_logprobs` was given.
        top_logprobs: The same of the `n_logprobs` most probable ids.
        finish_reason: Why the request has ended, None if it goes on.
    """

    request: Request
    token: int | None
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None
    finish_reason: str | None = None


@dataclass
class Row:
    """A row of the cache: the ids it holds, whose it is, and when it was last given away or given back."""

    held: list[int] = field(default_factory=list)
    request: Request | None = None
    last_used: int = 0


def n_common(first: list[int], second: list[int]) -> int:
    """Return how many ids two lists have in common before they first differ."""
    n = min(len(first), len(second))
    if first[:n] == second[:n]:  # quick, where a long beginning is shared
        return n
    return next(i for i in range(n) if first[i] != second[i])


class BatchEngine:
    """Continues many prompts at once over one cache; requests join and leave between two steps.

    What a request becomes is what `shared.generation.engine.generate` makes of it alone, with the same options and
    seed, up to the rounding of sums. Not for several threads: one thread calls all methods.

    Args:
        model: A `GPTModel`, as `BatchedPass` takes it; it runs in evaluation mode and without gradients.
        max_batch_size: Most requests that run at a time; more wait.
        context_length: Most tokens of a prompt and its continuation; None is the model's, but at most 2,048.
        prefill_chunk: Most tokens of prompts that one step reads, all prompts together, while a text is being written;
            `WHEN_ALONE` times as many while none is.
        share_prefixes: Whether the beginning of a prompt is taken from another text that begins alike.
        forbidden_ids: Ids that are never chosen, such as those that the tokenizer lacks.

    Raises:
        ValueError: A value is out of range, or the model is of an unknown kind.
        TypeError: A size is no int.
    """

    MIN_SHARED = 16  # fewer tokens in common are not worth a copy, nor waiting for
    WHEN_ALONE = 4  # times as much of the prompts is read while no text is being written

    def __init__(
        self,
        model: GPTModel,
        *,
        max_batch_size: int = 32,
        context_length: int | None = None,
        prefill_chunk: int = 64,
        share_prefixes: bool = True,
        forbidden_ids: Collection[int] = (),
    ) -> None:
        check_sizes(max_batch_size=max_batch_size, prefill_chunk=prefill_chunk)
        limit = model.config.context_length
        length = (
            min(limit, 2048) if context_length is None else whole_number("context_length", context_length)
        )
        require("context_length", length, length <= limit, f"at most the model's {limit}")
        self.model, self.context_length, self.prefill_chunk = model, length, prefill_chunk
        self.share_prefixes = share_prefixes
        self.cache = CacheRows(model, max_batch_size, length)
        self._read, self._modules = BatchedPass(model, self.cache), list(model.modules())
        forbidden = check_ids("forbidden_ids", forbidden_ids, model.config.vocab_size)
        self._forbidden = torch.tensor(forbidden, dtype=torch.int64, device=self.cache.storage.device)
        self._rows = [Row() for _ in range(max_batch_size)]
        self._waiting: deque[Request] = deque()
        self._reading: deque[Request] = deque()  # running, prompt not yet read to its end
        self._n_steps = 0
        self.prefix_hits = self.n_shared_tokens = 0

    def submit(
        self,
        prompt: Sequence[int],
        options: GenerationOptions | None = None,
        *,
        max_new_tokens: int | None = None,
        stop_ids: Collection[int] | None = None,
        seed: int | None = None,
        n_logprobs: int | None = None,
    ) -> Request:
        """Queue a prompt; nothing is computed before the next step.

        Args:
            prompt: At least one id.
            options: How it is continued, without stop strings and without overflow; None: the most probable tokens.
            max_new_tokens, stop_ids, seed: In place of those in the options.
            n_logprobs: Of each new token the logprob is reported, and those of this many most probable ids.

        Raises:
            ValueError: A value is out of range, or prompt and new tokens exceed the context.
        """
        options = GenerationOptions(temperature=0) if options is None else options
        require("overflow", options.overflow, options.overflow == "error", "'error' in a batch")
        arguments, size = options.id_arguments(), self.model.config.vocab_size
        # What is refused, by name.
        ids = check_ids("prompt", prompt, size)
        require("prompt", prompt, bool(ids), "at least one id")
        n_new = options.max_new_tokens if max_new_tokens is None else max_new_tokens
        n_new = check_number("max_new_tokens", n_new, 1, kind=int)
        if len(ids) + n_new > self.context_length + 1:  # the last new token is never read
            raise ValueError(
                f"prompt of {len(ids)} ids and max_new_tokens={n_new} exceed context_length={self.context_length}"
            )
        stops = check_ids("stop_ids", arguments["stop_tokens"] if stop_ids is None else stop_ids, size)
        if n_logprobs is not None:
            n_logprobs = check_number("n_logprobs", n_logprobs, 0, size, kind=int)
        seed = options.seed if seed is None else check_number("seed", seed, 0, 2**63 - 1, kind=int)
        # All random numbers in advance, from the request's own seed: no other request can shift them.
        uniforms = None
        if arguments["temperature"]:
            seed = int(torch.randint(2**62, ())) if seed is None else seed
            generator = torch.Generator().manual_seed(seed)
            uniforms = torch.empty(n_new, dtype=torch.float64).uniform_(generator=generator)
        request = Request(
            ids, options, n_new, frozenset(stops), n_logprobs, arguments["processors"], uniforms
        )
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request at once, without an event; one that has ended stays as it is."""
        if request.state == "waiting":
            self._waiting.remove(request)
        elif request in self._reading:
            self._reading.remove(request)
        if request.state != "done":
            self._end(request, "cancelled")

    def _end(self, request: Request, reason: str) -> None:
        """Note why a request has ended, and give its row back; what the row holds stays, for others to share."""
        request.state, request.finish_reason = "done", reason
        if request.row is not None:
            row, request.row = self._rows[request.row], None
            row.request, row.last_used = None, self._n_steps

    def _find_shared(self, request: Request) -> tuple[int | None, int]:
        """Return the row that begins most like a prompt, and in how many tokens; None for a row: better wait."""
        if not self.share_prefixes:
            return 0, 0
        prompt = request.prompt[:-1]  # the last token is read in any case: its logits are needed
        held = [n_common(row.held, prompt) for row in self._rows]
        most = max(held)
        coming = max((n_common(other.prompt, prompt) for other in self._reading), default=0)
        if coming > most and coming >= self.MIN_SHARED:
            return None, 0
        return held.index(most), most if most >= self.MIN_SHARED else 0

    def _admit(self) -> None:
        """Give free rows to waiting requests, in the order in which they came."""
        for request in list(islice(self._waiting, len(self._rows))):
            free = [number for number, row in enumerate(self._rows) if row.request is None]
            if not free:
                return
            source, n_shared = self._find_shared(request)
            if source is None:  # what it shares is being computed: it waits for that, others need not
                continue
            # A free row that holds little else is taken over; otherwise the row that rests longest is overwritten.
            others = [number for number in free if number != source]
            is_taken_over = source in free and len(self._rows[source].held) <= 2 * n_shared
            number = source
            if others and not is_taken_over:
                number = min(others, key=lambda number: self._rows[number].last_used)
            if n_shared and number != source:
                self.cache.copy(source, number, n_shared)
            self._waiting.remove(request)
            self._rows[number] = Row(request.prompt[:n_shared], request, self._n_steps)
            request.state, request.row, request.n_shared = "running", number, n_shared
            self._reading.append(request)
            self.prefix_hits += n_shared > 0
            self.n_shared_tokens += n_shared

    def _plan(self) -> list[tuple[Request, Piece]]:
        """Return what the next pass reads: the newest token of each text, and pieces of prompts up to the limit."""
        plan = []
        for row in self._rows:
            request = row.request
            if request is not None and len(row.held) >= len(request.prompt):
                plan.append((request, Piece(request.row, len(row.held), request.generated[-1:])))
        # Where no text is being written, a longer step keeps nobody waiting.
        left = self.prefill_chunk * (1 if plan else self.WHEN_ALONE)
        # The prompts take turns: who was read from now is the last next time.
        for request in list(self._reading):
            if not left:
                break
            begin = len(self._rows[request.row].held)
            tokens = request.prompt[begin : begin + left]
            left -= len(tokens)
            is_last = begin + len(tokens) == len(request.prompt)
            plan.append((request, Piece(request.row, begin, tokens, needs_logits=is_last)))
            self._reading.rotate(-1)
        return plan

    def _choose(self, requests: list[Request], logits: Tensor) -> list[int | None]:
        """Return the next token of each request; None where its logits (requests, vocab_size) are no numbers."""
        tokens: list[int | None] = [None] * len(requests)
        is_sound = logits.amax(dim=-1).isfinite().tolist() if requests else []
        # Requests with equal processors go together, but one whose processors look at its text goes by itself.
        groups: dict[tuple, list[int]] = {}
        for place, request in enumerate(requests):
            if is_sound[place]:
                reads_text = not all(isinstance(processor, TEXT_FREE) for processor in request.processors)
                key = (request.processors, request.uniforms is not None, place if reads_text else None)
                groups.setdefault(key, []).append(place)
        for (processors, is_random, alone), places in groups.items():
            found = logits if len(places) == len(requests) else logits[places]
            uniforms = torch.zeros(len(places), dtype=torch.float64)
            if processors:
                texts = [[0]] * len(places)  # nobody looks at them
                if alone is not None:
                    texts = [requests[alone].prompt + requests[alone].generated]
                found = apply_processors(processors, torch.tensor(texts, device=logits.device), found)
            if is_random:
                drawn = [requests[place].uniforms[len(requests[place].generated)] for place in places]
                uniforms = torch.stack(drawn)
            for place, token in zip(
                places, choose_tokens(found, float(is_random), uniforms).tolist(), strict=True
            ):
                tokens[place] = token
        return tokens

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Admit who waits, run the model once, and return what is new; with nothing to do it returns an empty list.

        If the model raises, no text has changed, and the next step tries again.
        """
        self._admit()
        plan = self._plan()
        if not plan:
            return []
        writers = [request for request, piece in plan if piece.needs_logits]
        with evaluating(self._modules):
            logits = as_float32(self._read([piece for _, piece in plan]))
        if len(self._forbidden):
            logits = logits.index_fill(1, self._forbidden, -math.inf)
        tokens = self._choose(writers, logits)
        # All went well: the rows now hold what was read.
        self._n_steps += 1
        for request, piece in plan:
            self._rows[piece.row].held.extend(piece.tokens)
            if piece.needs_logits and request in self._reading:
                self._reading.remove(request)
        return [self._note(*found) for found in zip(writers, tokens, logits, strict=True)]

    def _note(self, request: Request, token: int | None, logits: Tensor) -> Event:
        """Append a token to its request, end the request where that is due, and return the event."""
        if token is None or token in request.stop_ids:
            self._end(request, "error" if token is None else "stop")
            return Event(request, None, finish_reason=request.finish_reason)
        request.generated.append(token)
        logprob = top = None
        if request.n_logprobs is not None:
            logprobs = logits.log_softmax(dim=-1)
            values, ids = logprobs.topk(request.n_logprobs)
            logprob, top = logprobs[token].item(), dict(zip(ids.tolist(), values.tolist(), strict=True))
        if len(request.generated) == request.max_new_tokens:
            self._end(request, "length")
        return Event(request, token, logprob, top, request.finish_reason)

    @property
    def n_running(self) -> int:
        """How many requests have a row."""
        return sum(row.request is not None for row in self._rows)

    @property
    def n_waiting(self) -> int:
        """How many requests wait for a row."""
        return len(self._waiting)

    @property
    def n_free(self) -> int:
        """How many rows are free."""
        return len(self._rows) - self.n_running

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.n_running + self.n_waiting > 0

    @property
    def cache_tokens(self) -> int:
        """How many tokens of running requests the cache holds."""
        return sum(len(row.held) for row in self._rows if row.request is not None)

    @property
    def cache_capacity(self) -> int:
        """How many tokens the cache has room for."""
        return len(self._rows) * self.context_length


# Processors that look at the logits only, so that texts of different lengths can go through them together.
TEXT_FREE = (Temperature, TopK, TopP, MinP, Typical)
