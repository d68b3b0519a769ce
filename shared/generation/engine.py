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

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from shared.checks import plain_number, require
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
        logits: (rows, vocab_size), as `check_largest` allows them.
        temperature: Not negative.
        uniforms: float64 (rows,), in [0, 1); not used if `temperature` is 0.

    Raises:
        ValueError: Nothing can be chosen from a row, see `check_largest`.
    """
    if temperature == 0:
        largest, tokens = logits.max(dim=-1)
        check_largest(largest)
        return tokens
    numbers = as_float64(logits)
    largest = numbers.amax(dim=-1, keepdim=True)
    check_largest(largest)
    cumulative = ((numbers - largest) / temperature).softmax(dim=-1).cumsum(dim=-1)  # (rows, vocab_size)
    cumulative = cumulative / cumulative[:, -1:]  # the last is 1 exactly, above every uniform number
    darts = uniforms[:, None].to(cumulative.device).contiguous()
    return torch.searchsorted(cumulative, darts, right=True).squeeze(1).to(logits.device)


def check_largest(largest: Tensor) -> None:
    """Refuse rows of logits from which nothing can be chosen (ValueError), by the largest logit of each row.

    A row holds numbers, and -inf for what must not be chosen; one number at least. Otherwise the model or a processor
    is broken, and the largest logit shows it: it is NaN if there is one, +inf, or -inf where all are.
    """
    for number in largest.flatten().tolist():
        if not math.isfinite(number):
            wrong = "only -inf" if number == -math.inf else number
            raise ValueError(f"logits must be numbers or -inf, at least one number a row, got {wrong}")


def as_float64(numbers: Tensor) -> Tensor:
    """Return the numbers in float64, for sums over a vocabulary; those on Apple's GPU, which has none, on the CPU."""
    return (numbers.cpu() if numbers.device.type == "mps" else numbers).double()


@contextmanager
def evaluating(model: nn.Module | Sequence[nn.Module]) -> Iterator[None]:
    """Switch every module of a model, or of a list, to evaluation, and back to what it was before."""
    modules = model.modules() if isinstance(model, nn.Module) else model
    training = [module for module in modules if module.training]
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
        prompts: Lists of ids; their lengths may differ. An array or tensor (tokens,) is one prompt.
        max_new_tokens: Most ids to add to each prompt.
        temperature: 0 takes the most probable token; above 0, tokens are drawn from softmax(logits / temperature)
            after the processors. To scale before a processor, put a processor that scales in front of it.
        processors: Functions (ids, logits) -> logits, applied in turn before the choice.
        stop_tokens: Ids that end a row; they are not returned.
        seed: Of the random choices; row i has its own generator with seed + i, or the i-th of several seeds. None: the
            seeds are drawn from torch's global generator.
        overflow: If prompt and new tokens are longer than the model's context: "error" raises before anything is
            computed; "slide" goes on with the newest half of the context, read anew, whenever it is full. The last new
            id is never read, so prompt and new tokens may be one more than the context.

    Raises:
        ValueError: An argument is out of range (it is named), the context does not suffice, or the logits allow no
            choice (`check_largest`).
    """
    n_rows, steps = _start(
        model,
        prompts,
        max_new_tokens,
        stop_tokens,
        temperature=temperature,
        processors=processors,
        seed=seed,
        overflow=overflow,
    )
    new = [[] for _ in range(n_rows)]
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

    The options are those of `generate`; errors of arguments are raised at the call. Between two ids the model is in the
    mode in which it was before, so it may be trained, or write another text, meanwhile.
    """
    _, steps = _start(model, [prompt], max_new_tokens, stop_tokens, **options)
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
) -> tuple[int, Iterator[list[tuple[int, int]]]]:
    """Check every argument; return the number of prompts and the iterator of `_steps`."""
    # What is refused, before anything is computed.
    if overflow not in ("error", "slide"):
        raise ValueError(f"overflow must be 'error' or 'slide', got {overflow!r}")
    may_exceed = overflow == "slide"
    prompts, max_new_tokens = check_prompts(model, prompts, max_new_tokens, may_exceed)
    stops = check_ids("stop_tokens", stop_tokens, model.config.vocab_size)
    heat = plain_number(temperature)
    require("temperature", temperature, heat is not None and 0 <= heat < math.inf, "a number of at least 0")
    seeds = _seeds(seed, len(prompts), is_random=heat > 0)
    # All random numbers in advance, row by row: what one row does cannot shift those of another.
    uniforms = torch.zeros(len(prompts), max_new_tokens, dtype=torch.float64)
    if heat:
        for row, number in zip(uniforms, seeds, strict=True):
            row.uniform_(generator=torch.Generator().manual_seed(number))
    steps = _steps(model, prompts, max_new_tokens, heat, tuple(processors), frozenset(stops), uniforms)
    return len(prompts), steps


def _seeds(seed: int | Sequence[int] | None, n_rows: int, is_random: bool) -> list[int]:
    """Return a seed for each row; without any randomness torch's own generator is left alone."""
    if seed is None:
        return torch.randint(2**62, (n_rows,)).tolist() if is_random else [0] * n_rows
    are_several = plain_number(seed) is None and isinstance(seed, Iterable)
    seeds = [plain_number(number) for number in (seed if are_several else [seed])]
    are_allowed = all(isinstance(number, int) and 0 <= number < 2**63 for number in seeds)
    require("seed", seed, are_allowed, "whole numbers from 0 to 2**63 - 1")
    if not are_several:
        return [seeds[0] + i for i in range(n_rows)]
    if len(seeds) != n_rows:
        raise ValueError(f"seed must be one number, or one for each of {n_rows} prompts, got {len(seeds)}")
    return seeds


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
    rows, modules = _Rows(model, prompts, max_new_tokens), list(model.modules())
    # The number of each row's prompt; None when the row has ended.
    numbers: list[int | None] = list(range(len(prompts)))
    tokens = None
    for step in range(max_new_tokens):
        # From logits to one token a row. Only here the model is in evaluation mode: what happens to it between two
        # tokens is not our business.
        with evaluating(modules):
            logits = rows.read() if tokens is None else rows.advance(tokens)
            if logits.dtype in (torch.bfloat16, torch.float16):
                logits = logits.float()
            if processors:
                logits = rows.apply(processors, logits)
            if None in numbers:  # a row that has ended may have nothing left to choose
                ended = torch.tensor([number is None for number in numbers], device=logits.device)
                logits = logits.masked_fill(ended[:, None], 0.0)
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


def check_prompts(
    model: nn.Module, prompts: Iterable[Iterable[int]], max_new_tokens: int, may_exceed: bool = False
) -> tuple[list[list[int]], int]:
    """Return the prompts as lists, and the number of new tokens as an int, if they are allowed."""
    n_new = plain_number(max_new_tokens)
    is_allowed = isinstance(n_new, int) and n_new >= 1
    require("max_new_tokens", max_new_tokens, is_allowed, "an int of at least 1")
    vocab_size, limit = model.config.vocab_size, model.config.context_length
    if getattr(prompts, "ndim", 0) == 1 and "int" in str(prompts.dtype):
        prompts = [prompts]
    require("prompts", prompts, isinstance(prompts, Iterable), "a sequence of prompts")
    checked = [check_ids(f"prompts[{i}]", prompt, vocab_size) for i, prompt in enumerate(prompts)]
    for i, prompt in enumerate(checked):
        if not prompt:
            raise ValueError(f"prompts[{i}] must hold at least one id, got none")
        if len(prompt) + n_new > limit + 1 and not may_exceed:  # the last new token is never read
            raise ValueError(
                f"prompts[{i}] of {len(prompt)} ids and max_new_tokens={n_new} exceed the model's "
                f"context_length={limit}"
            )
    return checked, n_new


def check_ids(name: str, ids: Iterable[int], vocab_size: int) -> list[int]:
    """Return the ids as a list of ints; ValueError if they are none, or one is out of range."""
    try:
        given = list(ids.tolist() if hasattr(ids, "tolist") else ids)
    except TypeError:
        raise ValueError(f"{name} must be a sequence of ids, got {ids!r}") from None
    checked = [token if type(token) is int else plain_number(token) for token in given]
    for token, number in zip(given, checked, strict=True):
        if not isinstance(number, int) or not 0 <= number < vocab_size:
            raise ValueError(f"{name} must hold ids from 0 to {vocab_size - 1}, got {token!r}")
    return checked
