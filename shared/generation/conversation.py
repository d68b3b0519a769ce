"""A conversation over one key/value cache: each reply reads only what the cache does not hold.

The ids of all messages are made anew at each turn; what they have in common with the ids in the cache,
from the first on, is kept. A reply equals that of a conversation which starts from nothing.

Left out: several conversations at once, stop strings, and caches that outlive the process.

Follows prompt caching as llama.cpp's server has it.

Explained and proven in ch05_pretraining/07_a_real_model.ipynb; written from there by `make promote`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from shared.checks import check_text, whole_number
from shared.generation.decode_step import decode_step
from shared.generation.engine import apply_processors, choose_tokens, evaluating
from shared.generation.options import GenerationOptions
from shared.generation.streaming import decode_stream, forbid_unknown
from shared.text.chat_format import ChatFormat, Message
from shared.text.tokenizer import BPETokenizer


class Conversation:
    """A conversation with a model; each reply reads only what the cache does not hold already.

    Args:
        model: A decoder, as in `shared.generation.engine`.
        tokenizer: Its tokenizer; every special token ends a reply, so that none can stand in one.
        chat_format: How the model was taught to read messages.
        system: Content of the first message; None is the format's own.
        options: How replies are written, without stop strings. None: greedy, at most 128 tokens.
        max_length: Most tokens to remember; None is the model's context length, but at most 2,048. Where a
            conversation grows longer, its oldest turns are forgotten, the system message never.

    Attributes:
        messages: What was said.
        n_kept, n_read: Of the last reply: tokens that stood in the cache, and tokens that had to be read.

    Raises:
        ValueError: An option does not fit, or the tokenizer has more tokens than the model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: BPETokenizer,
        chat_format: ChatFormat,
        *,
        system: str | None = None,
        options: GenerationOptions | None = None,
        max_length: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.chat_format = model, tokenizer, chat_format
        self.options = options or GenerationOptions(temperature=0)
        self.arguments = self.options.id_arguments()
        self.processors = (*forbid_unknown(model, tokenizer), *self.arguments["processors"])
        limit = model.config.context_length
        self.max_length = min(limit, 2048) if max_length is None else whole_number("max_length", max_length)
        if self.max_length > limit or self.options.max_new_tokens >= self.max_length:
            raise ValueError(
                f"max_length must be above max_new_tokens={self.options.max_new_tokens} and at most {limit}, "
                f"got {self.max_length}"
            )
        self.stops = {*tokenizer.special_ids.values(), *self.arguments["stop_tokens"]}
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.n_kept = self.n_read = 0
        self._caches, self._held = model.new_caches(self.max_length), []  # the ids that the caches hold

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of messages and of the beginning of a reply, without the oldest turns where they do not fit.

        Raises ValueError if the first (a system message) and the last message alone are too long.
        """
        messages = self.chat_format.complete(messages)
        parts = [self.chat_format.encode_message(self.tokenizer, message) for message in messages]
        opening = self.chat_format.generation_prompt(self.tokenizer)
        room = (
            self.max_length + 1 - self.options.max_new_tokens - len(opening)
        )  # the last new token is not read
        n_system = messages[0]["role"] == "system"
        first, length = n_system, sum(map(len, parts))
        # A turn is a user's message and the reply to it.
        while length > room and first < len(parts) - 1:
            length -= len(parts[first])
            first += 1
            while messages[first]["role"] != "user" and first < len(parts) - 1:
                length -= len(parts[first])
                first += 1
        if length > room:
            raise ValueError(
                f"the message has too many tokens: with all around it {length}, room is for {room}"
            )
        kept = [*parts[:n_system], *parts[first:], opening]
        return [token for part in kept for token in part]

    @torch.inference_mode()
    def tokens(self, ids: Sequence[int]) -> Iterator[int]:
        """Yield the ids of a reply to a prompt, each as soon as it is chosen, until a special token."""
        # Keep what the prompt has in common with what was read, at most all but the last token.
        same = zip(self._held, ids[:-1], strict=False)
        self.n_kept = next(
            (i for i, (old, new) in enumerate(same) if old != new), min(len(self._held), len(ids) - 1)
        )
        for cache in self._caches:
            cache.crop(self.n_kept)
        self._held, unread = list(ids[: self.n_kept]), list(ids[self.n_kept :])
        self.n_read = len(unread)
        # One random number a token, in advance.
        n_new, seed = self.options.max_new_tokens, self.arguments["seed"]
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        uniforms = torch.rand(n_new, 1, dtype=torch.float64, generator=generator)
        device, modules = next(self.model.parameters()).device, list(self.model.modules())
        step = decode_step(self.model)
        written = list(ids)
        for uniform in uniforms:
            with evaluating(modules):
                tokens = torch.tensor([unread], device=device)
                if len(unread) > 1 or not self._held:
                    logits = self.model(tokens, caches=self._caches, last_only=True)[:, -1]
                else:
                    logits = step(tokens, None, None, self._caches)[:, -1]
                logits = logits.float()
                if self.processors:
                    seen = torch.tensor([written], device=device)
                    logits = apply_processors(self.processors, seen, logits)
                token = int(choose_tokens(logits, self.arguments["temperature"], uniform))
            self._held += unread
            if token in self.stops:
                return
            unread = [token]
            written.append(token)
            yield token

    def reply(self, content: str) -> Iterator[str]:
        """Say something, and yield the reply in pieces of text, each as soon as it is certain.

        To close the iterator ends the reply; what was said until then is remembered.

        Raises:
            ValueError: At the call, if the message does not fit.
            TypeError: At the call, if it is no text.
        """
        check_text("content", content)
        messages = [*self.messages, {"role": "user", "content": content}]
        return self._say(messages, self.prompt(messages))

    def _say(self, messages: list[Message], ids: list[int]) -> Iterator[str]:
        said: list[str] = []
        try:
            for piece in decode_stream(self.tokenizer, self.tokens(ids)):
                said.append(piece)
                if piece:
                    yield piece
        finally:
            self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]
