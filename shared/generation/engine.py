"""From prompts to new tokens, ids to ids: one engine for every decoder of the project, with a key/value
cache, in batches, as a stream.

Of a model it needs `config.context_length`, `config.vocab_size`, `new_caches(max_length)`, and a call
`model(tokens, positions=, key_padding_mask=, caches=, last_only=)` -> logits, as
`shared.model.gpt.GPTModel` has them. What one row of a batch becomes depends neither on the other rows
nor on whether its tokens are streamed. How logits are reshaped before the choice (top-k and the like) is
a matter of processors, which `shared.generation.sampling` has; this module only calls them.

Left out: text (`shared.generation.streaming`), beam search, speculative decoding (each in a module of its
own), prompts that join a running batch, caches in pages.

Follows Pope et al. (2023, "Efficiently Scaling Transformer Inference") on prefill and decode.

Explained and proven in ch04_gpt/03_generation.ipynb; written from there by `make promote`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from shared.generation.decode_step import decode_step

# Called as processor(ids, logits): ids int64 (rows, tokens), all that was read and written so far; logits
# (rows, vocab_size); returns the new logits. The rows of one call have the same number of tokens.
Processor = Callable[[Tensor, Tensor], Tensor]


class _Rows:
    """The unfinished rows of a batch: their tokens, and what the model's next pass needs.

    `ids` (rows, width) holds the tokens, so that all rows end at column `end` and row i begins at column `begins[i]`.
    The model sees row i from column `visible[i]` on, which is later where the context has slid.
    """

    def __init__(self, model: nn.Module, prompts: list[list[int]], max_new_tokens: int) -> None:
        self.model, self.limit, self.step = model, model.config.context_length, decode_step(model)
        self.device = next(model.parameters()).device
        self.end = max(map(len, prompts))
        self.last_column = self.end + max_new_tokens
        self.begins = [self.end - len(prompt) for prompt in prompts]
        padded = [[0] * self.last_column for _ in prompts]  # any id will do: it is masked
        for row, prompt, begin in zip(padded, prompts, self.begins, strict=True):
            row[begin : self.end] = prompt
        self.ids = torch.tensor(padded, device=self.device)
        self.visible = list(self.begins)

    def read(self) -> Tensor:
        """Run the model over all visible tokens into new caches (prefill); return logits (rows, vocab_size)."""
        # A row too long for the context keeps its newest half, so that the next time is not the next token.
        for i, first in enumerate(self.visible):
            if self.end - first > self.limit:
                self.visible[i] = self.end - max(self.limit // 2, 1)
        # New caches, as large as they can become.
        left = min(self.visible)
        self.longest = self.end - left  # tokens that the model sees of the longest row
        size = min(self.limit, self.last_column - left)
        self.caches = self.model.new_caches(size)
        # Where the rows begin at different columns, a mask hides the padding, and each row counts its own positions.
        self.mask = self.positions = None
        positions = None
        if any(first > left for first in self.visible):
            columns = torch.arange(left, left + size, device=self.device)
            distances = columns - torch.tensor(self.visible, device=self.device)[:, None]  # (rows, size)
            self.mask = distances >= 0
            positions = distances[:, : self.longest].clamp(min=0)
            self.positions = positions[:, -1:].clone()
        logits = self.model(
            self.ids[:, left : self.end],
            positions=positions,
            key_padding_mask=self._seen(),
            caches=self.caches,
            last_only=True,
        )
        return logits.squeeze(1)

    def advance(self, tokens: Tensor) -> Tensor:
        """Append `tokens` (rows,), run the model over them alone (decode) and return logits (rows, vocab_size)."""
        self.ids[:, self.end] = tokens
        self.end += 1
        self.longest += 1
        if self.longest > self.limit:
            return self.read()
        if self.positions is not None:
            self.positions += 1
        return self.step(tokens[:, None], self.positions, self._seen(), self.caches).squeeze(1)

    def _seen(self) -> Tensor | None:
        """Return the mask (rows, keys) of the tokens that are no padding; None if all are."""
        return None if self.mask is None else self.mask[:, : self.longest]

    def apply(self, processors: Sequence[Processor], logits: Tensor) -> Tensor:
        """Let the processors change the logits: all rows at once if they are equally long, else one by one."""
        if len(set(self.begins)) == 1:
            return apply_processors(processors, self.ids[:, self.begins[0] : self.end], logits)
        rows = zip(self.ids, self.begins, logits, strict=True)
        done = [
            apply_processors(processors, ids[None, begin : self.end], row[None]) for ids, begin, row in rows
        ]
        return torch.cat(done)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        index = torch.tensor(rows, device=self.device)
        self.begins, self.visible = [self.begins[i] for i in rows], [self.visible[i] for i in rows]
        self.ids = self.ids[index]
        if self.mask is not None:
            self.mask, self.positions = self.mask[index], self.positions[index]
        for cache in self.caches:
            cache.reorder(index)


def apply_processors(processors: Sequence[Processor], ids: Tensor, logits: Tensor) -> Tensor:
    """Return logits (rows, vocab_size) after all processors, the first one first.

    `ids` (rows, tokens), int64, are the tokens so far; a row needs at least one finite logit. Raises ValueError if a
    shape or type does not fit, or a processor returns another shape.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floats (rows, vocab_size), got {logits.dtype} {tuple(logits.shape)}"
        )
    if ids.dim() != 2 or len(ids) != len(logits) or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 ({len(logits)}, tokens), got {ids.dtype} {tuple(ids.shape)}")
    for processor in processors:
        shape, logits = logits.shape, processor(ids, logits)
        if logits.shape != shape:
            raise ValueError(f"processor must return logits {tuple(shape)}, got {tuple(logits.shape)}")
    return logits


def choose_tokens(logits: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """Return the next token of each row, int64 (rows,): the most probable if `temperature` is 0, else a random one.

    The random choice inverts the cumulative distribution of softmax(logits / temperature): one uniform number a row
    decides, so that a row's choice depends on nothing but its own logits and its own number.

    Args:
        logits: (rows, vocab_size); -inf for what must not be chosen.
        temperature: Not negative.
        uniforms: float64 (rows,), in [0, 1); not used if `temperature` is 0.

    Raises:
        ValueError: A row to draw from is NaN, or allows no token.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.double()
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)  # (rows, vocab_size)
    cumulative = cumulative / cumulative[:, -1:]  # the last is 1 exactly, above every uniform number
    if cumulative[:, -1].isnan().any():
        raise ValueError(
            "logits must be numbers or -inf, with at least one number a row, got NaN or only -inf"
        )
    return torch.searchsorted(cumulative, uniforms[:, None].contiguous(), right=True).squeeze(1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation, and back to what it was before."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class EngineOptions(TypedDict, total=False):
    """The arguments of `generate` that `stream` and the functions for text pass on as they are."""

    temperature: float
    processors: Sequence[Processor]
    seed: int | Sequence[int] | None
    overflow: str


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    processors: Sequence[Processor] = (),
    stop_tokens: Sequence[int] = (),
    seed: int | Sequence[int] | None = None,
    overflow: str = "error",
) -> list[list[int]]:
    """Continue each prompt and return the new ids of each, in the order of the prompts.

    Args:
        model: A decoder, as the module's docstring says. It runs in evaluation mode and without gradients.
        prompts: Lists of ids; their lengths may differ.
        max_new_tokens: Most ids to add to each prompt.
        temperature: 0 takes the most probable token; above 0, tokens are drawn from softmax(logits / temperature)
            after the processors. To scale before a processor, put a processor that scales in front of it.
        processors: Functions (ids, logits) -> logits, applied in turn before the choice.
        stop_tokens: Ids that end a row; they are not returned.
        seed: Of the random choices; row i has its own generator with seed + i, or the i-th of several seeds. None: the
            seeds are drawn from torch's global generator.
        overflow: If prompt and new tokens are longer than the model's context: "error" raises before anything is
            computed; "slide" goes on with the newest half of the context, read anew, whenever it is full.

    Raises:
        ValueError: An argument is out of range (it is named), or the context does not suffice.
    """
    steps = _start(
        model,
        prompts,
        max_new_tokens,
        stop_tokens,
        temperature=temperature,
        processors=processors,
        seed=seed,
        overflow=overflow,
    )
    new = [[] for _ in prompts]
    for step in steps:
        for row, token in step:
            new[row].append(token)
    return new


def stream(
    model: nn.Module,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    stop_tokens: Sequence[int] = (),
    **options: Unpack[EngineOptions],
) -> Iterator[int]:
    """Yield the ids that `generate(model, [prompt], ...)` returns, each as soon as it is chosen.

    The options are those of `generate`; errors are raised at the call. Until the iterator is used up or closed, the
    model stays in evaluation mode.
    """
    steps = _start(model, [prompt], max_new_tokens, stop_tokens, **options)
    return (token for step in steps for _, token in step)


def _start(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    *,
    temperature: float = 0.0,
    processors: Sequence[Processor] = (),
    seed: int | Sequence[int] | None = None,
    overflow: str = "error",
) -> Iterator[list[tuple[int, int]]]:
    """Check every argument and return the iterator of `_steps`."""
    # What is refused, before anything is computed.
    if overflow not in ("error", "slide"):
        raise ValueError(f"overflow must be 'error' or 'slide', got {overflow!r}")
    prompts = check_prompts(model, prompts, max_new_tokens, may_exceed=overflow == "slide")
    stops = check_ids("stop_tokens", stop_tokens, model.config.vocab_size)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number of at least 0, got {temperature}")
    # A seed for each row; without any randomness torch's own generator is left alone.
    if seed is None and temperature and prompts:
        seeds = torch.randint(2**62, (len(prompts),)).tolist()
    elif seed is None:
        seeds = [0] * len(prompts)
    else:
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ValueError(
            f"seed must be one number, or one for each of {len(prompts)} prompts, got {len(seeds)}"
        )
    # All random numbers in advance, row by row: what one row does cannot shift those of another.
    uniforms = torch.zeros(len(prompts), max_new_tokens, dtype=torch.float64)
    if temperature:
        for row, number in zip(uniforms, seeds, strict=True):
            row.uniform_(generator=torch.Generator().manual_seed(number))
    return _steps(model, prompts, max_new_tokens, temperature, tuple(processors), frozenset(stops), uniforms)


@torch.inference_mode()
def _steps(
    model: nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    processors: tuple[Processor, ...],
    stop_tokens: frozenset[int],
    uniforms: Tensor,
) -> Iterator[list[tuple[int, int]]]:
    """Yield, for each step, the pairs (number of the prompt, new id) of the rows that go on."""
    if not prompts:
        return
    with evaluating(model):
        rows = _Rows(model, prompts, max_new_tokens)
        uniforms = uniforms.to(rows.device)
        # The number of each row's prompt; None when the row has ended.
        numbers: list[int | None] = list(range(len(prompts)))
        logits = rows.read()
        for step in range(max_new_tokens):
            # From logits to one token a row.
            if logits.dtype in (torch.bfloat16, torch.float16):
                logits = logits.float()
            if processors:
                logits = rows.apply(processors, logits)
            tokens = choose_tokens(logits, temperature, uniforms[:, step])
            # A row that has chosen a stop token has ended, and does not show it.
            pairs = list(zip(numbers, tokens.tolist(), strict=True))
            if stop_tokens:
                numbers = [None if token in stop_tokens else number for number, token in pairs]
            yield [pair for pair, number in zip(pairs, numbers, strict=True) if number is not None]
            n_going = len(numbers) - numbers.count(None)
            if not n_going or step == max_new_tokens - 1:
                return
            # Rows that have ended leave the batch; copying the caches for fewer than a tenth would not pay.
            if n_going <= 0.9 * len(numbers):
                kept = [i for i, number in enumerate(numbers) if number is not None]
                rows.keep(kept)
                numbers, tokens, uniforms = [numbers[i] for i in kept], tokens[kept], uniforms[kept]
            logits = rows.advance(tokens)


def check_prompts(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, may_exceed: bool = False
) -> list[list[int]]:
    """Return the prompts as lists, if they and the number of new tokens are allowed."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an int of at least 1, got {max_new_tokens!r}")
    vocab_size, limit = model.config.vocab_size, model.config.context_length
    checked = [check_ids(f"prompts[{i}]", prompt, vocab_size) for i, prompt in enumerate(prompts)]
    for i, prompt in enumerate(checked):
        if not prompt:
            raise ValueError(f"prompts[{i}] must hold at least one id, got none")
        if len(prompt) + max_new_tokens > limit and not may_exceed:
            raise ValueError(
                f"prompts[{i}] of {len(prompt)} ids and max_new_tokens={max_new_tokens} exceed the model's "
                f"context_length={limit}"
            )
    return checked


def check_ids(name: str, ids: Sequence[int], vocab_size: int) -> list[int]:
    """Return the ids as a list of ints; ValueError if they are none, or one is out of range."""
    try:
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    except TypeError:
        raise ValueError(f"{name} must be a sequence of ids, got {ids!r}") from None
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise ValueError(f"{name} must hold ids from 0 to {vocab_size - 1}, got {token!r}")
    return ids
