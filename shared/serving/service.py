"""A model that is served: from the texts of a request to sequences for the engine, and the small tasks beside them.

Nothing here knows of HTTP but the kind of its errors. Left out: several models in one process; each is one server.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from shared.generation.batching import BatchEngine
from shared.generation.options import GenerationOptions
from shared.generation.sampling import SMALLEST
from shared.safety.filters import ContentFilter, OutputGuard
from shared.serving.errors import ApiError, not_found, unsupported
from shared.serving.limits import Limits
from shared.serving.loading import LoadedOnce
from shared.serving.metrics import Metrics
from shared.serving.models import OpenedModel
from shared.serving.pictures import PICTURES, PictureClassifier, PictureReader, open_picture_classifier
from shared.serving.pieces import GuardedWriter, Piece, TextWriter
from shared.serving.schemas import ChatMessage, Prompt, Writing
from shared.serving.worker import Job, Worker
from shared.text.tokenizer import BPETokenizer

if TYPE_CHECKING:  # it imports much, which nobody needs before the first text to classify
    from shared.finetuning.classification import TextClassifier

DEFAULT_CONTEXT = 2048
MOST_FAILURES = 3  # steps in a row
SEEDS = 10**18  # those of `GenerationOptions` are below


class Service:
    """A model with its engine, its worker and its counters.

    Args:
        opened: The model, with a tokenizer.
        limits: What is taken.
        classifier: For `/v1/classify`: its name, and what loads it when it is first asked; None if there is none.
        threads: How many threads the engine computes with; None is torch's default.
        pictures: As `classifier`, for pictures; None is the one that ships.
        content_filter: Reads prompts before and replies while they are written; None reads nothing.

    Attributes:
        name: Of the model, for clients.
        draining: Whether it takes no new requests, since it is about to end.

    Raises:
        ValueError: There is no tokenizer, or a limit does not fit the model.
    """

    def __init__(
        self,
        opened: OpenedModel,
        limits: Limits | None = None,
        classifier: "tuple[str, Callable[[], TextClassifier]] | None" = None,
        threads: int | None = None,
        pictures: tuple[str, Callable[[], PictureClassifier]] | None = None,
        content_filter: ContentFilter | None = None,
    ) -> None:
        self.limits, self.metrics = limits or Limits(), Metrics()
        self.content_filter = content_filter
        self.classifier_name = None if classifier is None else classifier[0]
        self._classifier = None if classifier is None else LoadedOnce(classifier[1])
        self.name, self.model, self.tokenizer = opened.name, opened.model, opened.needed_tokenizer()
        self.chat_format, self.created, self.draining = opened.chat_format, int(time.time()), False
        # A special token in a continuation ends it, so that no reply holds one; what is no token is never chosen.
        try:
            self._begin = [self.tokenizer.eot_token]
        except (KeyError, ValueError):  # there is none
            self._begin = []
        special = getattr(self.tokenizer, "special_ids", None)
        self.stop_ids = frozenset(self._begin if special is None else special.values())
        sizes = [self._size_of(token) for token in range(self.model.config.vocab_size)]
        self._longest_token = max(sizes)
        most = self.model.config.context_length
        self.context_length = min(most, self.limits.context_length or DEFAULT_CONTEXT)
        self.engine = BatchEngine(
            self.model,
            max_batch_size=self.limits.max_batch_size,
            context_length=self.context_length,
            forbidden_ids=[token for token, size in enumerate(sizes) if not size],
        )
        self.worker = Worker(
            self.engine, self.limits.max_batch_size, self.limits.max_waiting, self.metrics, threads
        )
        name, load = pictures or (PICTURES, open_picture_classifier)
        self.pictures = PictureReader(name, load, self.worker)
        self._encoder = ThreadPoolExecutor(1, "tokenizer")
        self._watch()

    def _size_of(self, token: int) -> int:
        """Return how many bytes a token has, 0 for an id that the tokenizer lacks."""
        try:
            return len(self.tokenizer.decode_single_token_bytes(token))
        except (KeyError, ValueError):
            return 0

    def _watch(self) -> None:
        """Let the metrics read how full everything is."""
        watch, engine = self.metrics.watch, self.engine
        watch("running", "Sequences that are being written", lambda: engine.n_running)
        watch(
            "waiting",
            "Sequences that wait for a place",
            lambda: max(0, self.worker.n_open - engine.n_running),
        )
        watch("cache_tokens", "Tokens in the key and value cache", lambda: engine.cache_tokens)
        watch("cache_capacity_tokens", "Tokens the cache has room for", lambda: engine.cache_capacity)
        watch(
            "shared_prefix_tokens",
            "Tokens of prompts that were not computed again",
            lambda: engine.n_shared_tokens,
        )
        watch("draining", "1 while the server is about to end", lambda: self.draining)

    async def warm_up(self) -> None:
        """Write two tokens, so that the first caller does not pay for what the first step sets up."""

        def write() -> None:
            request = self.engine.submit(self._begin or [0], max_new_tokens=2)
            while request.finish_reason is None:
                self.engine.step()

        await self.worker.call(write)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to compute."""
        self.worker.start(loop)

    def stop(self) -> None:
        """Stop computing."""
        self.worker.stop()
        self._encoder.shutdown(wait=False, cancel_futures=True)
        self.pictures.stop()

    @property
    def is_ready(self) -> bool:
        """Whether a new request would be served."""
        return self.is_healthy and not self.draining

    @property
    def is_healthy(self) -> bool:
        """Whether it computes, and did not fail several times without a success between."""
        return self.worker.is_alive and self.worker.n_failures < MOST_FAILURES

    def check_model(self, model: str) -> None:
        """Refuse the name of another model (ApiError, 404)."""
        if model != self.name:
            raise not_found(model, [self.name])

    # --- from texts to ids

    async def encode(self, text: str, param: str) -> list[int]:
        """Return the ids of a text, in which special tokens are ordinary text. ApiError if it is far too long."""
        # Long texts are refused before they are encoded, and encoded where they hold up nobody.
        if len(text.encode()) > self.context_length * self._longest_token:
            raise self._too_long(param, f"about {len(text):,} characters")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoder, self.tokenizer.encode_ordinary, text)

    async def encode_prompts(self, prompt: Prompt, param: str) -> list[list[int]]:
        """Return a list of ids for each prompt of a request."""
        if isinstance(prompt, str):
            prompts: list[Any] = [prompt]
        else:
            prompts = [prompt] if prompt and isinstance(prompt[0], int) else list(prompt)
        if not prompts:
            raise ApiError(400, f"{param} must hold at least one text", param=param)
        return [await self.encode(text, param) if isinstance(text, str) else text for text in prompts]

    async def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the ids of a conversation and of the beginning of a reply."""
        if self.chat_format is None or not isinstance(self.tokenizer, BPETokenizer):
            raise ApiError(
                400,
                f"{self.name} was taught no chat format; use /v1/completions",
                code="unsupported",
                param="model",
            )
        plain = []
        for number, message in enumerate(messages):
            text = message.text()
            if text is None:
                raise unsupported(
                    f"messages.{number}.content", "must be text: images and sounds are not read"
                )
            plain.append({"role": message.role.replace("developer", "system"), "content": text})
        size = sum(len(message["content"].encode()) for message in plain)
        if size > self.context_length * self._longest_token:
            raise self._too_long("messages", f"about {size:,} bytes")
        encode = self.chat_format.encode
        return await asyncio.get_running_loop().run_in_executor(self._encoder, encode, self.tokenizer, plain)

    async def check_content(self, texts: Sequence[str], param: str) -> None:
        """Refuse texts that the content filter blocks (ApiError, 400, code "content_filter")."""
        if self.content_filter is None:
            return
        check, loop = self.content_filter.check, asyncio.get_running_loop()
        for text in texts:
            if (await loop.run_in_executor(self._encoder, check, text)).blocked:
                message = f"{param} was blocked by the content filter"
                raise ApiError(400, message, code="content_filter", param=param)

    def _too_long(self, param: str, size: str) -> ApiError:
        message = (
            f"{param} and what is to be written must have at most {self.context_length} tokens, got {size}"
        )
        return ApiError(400, message, code="context_length_exceeded", param=param)

    # --- from a request to sequences

    def jobs(
        self,
        request: Writing,
        prompts: Sequence[list[int]],
        *,
        param: str,
        max_tokens: int | None,
        default_max: int | None,
        n_logprobs: int | None,
    ) -> list[Job]:
        """Return the sequences of a request: its prompts, each `n` times.

        Args:
            request: The settings.
            prompts: Ids; an empty prompt is begun by the end-of-text token.
            param: The name of the field with the prompts, for errors.
            max_tokens: Most tokens to write; None is `default_max`, and that is what there is room for.
            default_max, n_logprobs: See above, and `Job`.

        Raises:
            ApiError: Something does not fit (400).
        """
        n, most = request.n or 1, min(self.limits.max_sequences, self.worker.max_open)
        if len(prompts) * n > most:
            raise ApiError(400, f"{param} times n must be at most {most} sequences", param="n")
        queue: asyncio.Queue[Piece] = asyncio.Queue()
        jobs, stops, vocab_size = [], request.stops(), self.tokenizer.n_vocab
        for number, ids in enumerate(prompts):
            ids = ids or self._begin
            if not ids:
                raise ApiError(400, f"{param} must not be empty: nothing begins a text here", param=param)
            if max(ids) >= vocab_size:
                raise ApiError(400, f"{param} must hold ids below {vocab_size}", param=param)
            # The last token that is written is not read, so it needs no room.
            room = self.context_length + 1 - len(ids)
            if room < 1:
                raise self._too_long(param, f"{len(ids)} without what is to be written")
            # "At most so many" also where there is room for fewer: many clients ask for a thousand whatever is said.
            wanted = min(max_tokens or default_max or room, self.limits.max_new_tokens or room, room)
            options = self._options(request, wanted)
            for choice in range(n):
                index = number * n + choice
                seed = None if request.seed is None else (request.seed + index) % SEEDS
                writer = self._writer(stops)
                job = Job(
                    index, ids, options, self.stop_ids, writer, queue, seed, n_logprobs, bool(request.stream)
                )
                jobs.append(job)
        return jobs

    def _writer(self, stops: Sequence[str]) -> TextWriter:
        """Return what turns the tokens of one continuation into text, through the filter if there is one."""
        if self.content_filter is None:
            return TextWriter(self.tokenizer, stops)
        check = self.content_filter.check
        return GuardedWriter(self.tokenizer, stops, OutputGuard(lambda text: check(text).blocked))

    def _options(self, request: Writing, max_new_tokens: int) -> GenerationOptions:
        """Return the settings of a request; what is not given is OpenAI's default."""
        temperature = 1.0 if request.temperature is None else request.temperature
        try:
            return GenerationOptions(
                max_new_tokens=max_new_tokens,
                temperature=temperature if temperature >= SMALLEST else 0.0,
                top_p=1.0 if request.top_p is None else max(request.top_p, SMALLEST),
                top_k=request.top_k or 0,
                min_p=request.min_p or 0.0,
                repetition_penalty=max(request.repetition_penalty or 1.0, SMALLEST),
                presence_penalty=request.presence_penalty or 0.0,
                frequency_penalty=request.frequency_penalty or 0.0,
            )
        except ValueError as error:
            raise ApiError(400, str(error)) from None

    # --- the small tasks

    async def embed(self, ids: list[int]) -> list[float]:
        """Return the mean of the last hidden states over the tokens, at length 1; computed between two steps."""
        if not 1 <= len(ids) <= self.context_length:
            message = f"a text must have 1 to {self.context_length} tokens, got {len(ids)}"
            raise ApiError(400, message, code="context_length_exceeded", param="input")
        if max(ids) >= self.tokenizer.n_vocab:
            raise ApiError(400, f"input must hold ids below {self.tokenizer.n_vocab}", param="input")

        @torch.inference_mode()
        def compute() -> list[float]:
            device = next(self.model.parameters()).device
            mean = self.model.hidden_states(torch.tensor([ids], device=device))[0].float().mean(dim=0)
            return (mean / mean.norm().clamp(min=1e-12)).tolist()

        return await self.worker.call(compute)

    async def classify(self, text: str) -> dict[str, float]:
        """Return label -> probability for a text; computed between two steps."""
        assert self._classifier is not None
        classifier = await self._classifier.get()
        limit, encoding = classifier.body.config.context_length, classifier.encoding
        n_tokens = 0
        if text and len(text) <= 100 * limit:
            n_tokens = len(
                await asyncio.get_running_loop().run_in_executor(
                    self._encoder, encoding.encode_ordinary, text
                )
            )
        if not 1 <= n_tokens <= limit:
            message = f"a text must have 1 to {limit} tokens"
            raise ApiError(400, message, code="context_length_exceeded", param="input")

        def compute() -> dict[str, float]:
            return dict(zip(classifier.labels, classifier.predict_proba([text])[0].tolist(), strict=True))

        return await self.worker.call(compute)
