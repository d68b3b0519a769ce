"""Speculative decoding: what greedy generation writes, in fewer passes of the model.

Something cheap guesses the next few ids, one pass of the model checks them all, and what it would not
have chosen itself is thrown away. The guesses come from the text so far or from a smaller model.

Left out: batches, and drawing at random (for that a guess is accepted with a probability).

Follows Leviathan et al. (2023, "Fast Inference from Transformers via Speculative Decoding") and, for
guesses without a model, Saxena (2023, "Prompt Lookup Decoding").

Explained and proven in ch04_gpt/04_fast_generation.ipynb; written from there by `make promote`.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import nn

from shared.checks import require, whole_number
from shared.generation.decode_step import decode_step
from shared.generation.engine import check_ids, check_largest, check_prompts, evaluating

# Vocabularies are padded to multiples of 64 or 128: by no more than this, one tokenizer's differ in size from model to
# model. llama.cpp draws the same line.
MOST_PADDING = 128


@dataclass(frozen=True)
class Speculation:
    """What speculative decoding wrote, and what it took: the new ids, forward passes of the model (the prompt's
    included), and how many ids were proposed and accepted."""

    ids: list[int]
    n_passes: int
    n_proposed: int
    n_accepted: int

    @property
    def acceptance_rate(self) -> float:
        """Share of the proposed ids that were accepted; 0 if none was proposed."""
        return self.n_accepted / self.n_proposed if self.n_proposed else 0.0


@torch.inference_mode()
def generate_speculatively(
    model: nn.Module,
    prompt: Sequence[int],
    max_new_tokens: int,
    propose: Callable[[list[int], int], list[int]],
    *,
    n_ahead: int = 4,
    stop_tokens: Sequence[int] = (),
) -> Speculation:
    """Write what greedy `generate` writes, in fewer passes of the model (Leviathan et al., 2023).

    `propose` guesses the next ids; one pass of the model checks all of them. Those before the first mistake are
    accepted, and the model's own choice after them comes for free. A poor guess costs time, never a different id.

    Args:
        model, prompt, max_new_tokens, stop_tokens: As in `generate`.
        propose: Called with all ids so far and a number n, it returns up to n ids: `PromptLookup`, `DraftModel`. From
            the first one that is no id of the model on, its guesses are not used.
        n_ahead: Most ids to propose for one pass.

    Raises:
        ValueError: As `generate`; n_ahead is below 1; or a draft model's vocabulary is of another size, and the
            difference is more than padding.
    """
    # What is refused, before anything is computed.
    n_ahead, vocab_size = whole_number("n_ahead", n_ahead), model.config.vocab_size
    if isinstance(propose, DraftModel):
        draft_size = propose.model.config.vocab_size
        is_padding = abs(draft_size - vocab_size) <= MOST_PADDING
        require(
            "vocab_size of the draft model",
            draft_size,
            is_padding,
            f"the model's, {vocab_size}, but for padding",
        )
    (ids,), max_new_tokens = check_prompts(model, [prompt], max_new_tokens)
    stops = set(check_ids("stop_tokens", stop_tokens, vocab_size))
    device, n_prompt, end = next(model.parameters()).device, len(ids), len(ids) + max_new_tokens
    caches = model.new_caches(end - 1)  # the last id is never read
    n_passes = n_proposed = n_accepted = 0
    guesses, unread = [], ids  # what the next pass reads, after what the caches hold
    with evaluating(model):
        step = decode_step(model)
        while True:
            # One pass. Of the prompt only the last logits are wanted; later, those after the newest id and each guess.
            tokens = torch.tensor([unread + guesses], device=device)
            if n_passes:
                logits = step(tokens, None, None, caches)
            else:
                logits = model(tokens, caches=caches, last_only=True)
            # The guesses before the first one that the model would not have chosen are right.
            choices = logits[0].argmax(dim=-1).tolist()
            n_right = next((i for i, guess in enumerate(guesses) if guess != choices[i]), len(guesses))
            check_largest(logits[0, : n_right + 1].amax(dim=-1))
            n_passes, n_proposed, n_accepted = n_passes + 1, n_proposed + len(guesses), n_accepted + n_right
            # The caches forget the wrong guesses; the model's own choice comes after the right ones.
            for cache in caches:
                cache.crop(cache.length - len(guesses) + n_right)
            unread = choices[n_right : n_right + 1]
            ids = ids + choices[: n_right + 1]
            # Done, if one of the new ids is a stop token or there is no room left.
            stop = next((i for i in range(len(ids) - n_right - 1, len(ids)) if ids[i] in stops), None)
            if stop is not None or len(ids) == end:
                return Speculation(ids[n_prompt:stop], n_passes, n_proposed, n_accepted)
            # New guesses, one less than there is room for: the pass itself adds one id.
            n_room = min(n_ahead, end - len(ids) - 1)
            proposed = list(propose(ids, n_room))[:n_room] if n_room else []
            guesses = list(takewhile(lambda guess: 0 <= guess < vocab_size, proposed))


class PromptLookup:
    """Propose what followed the last few ids when they occurred before (Saxena, 2023).

    It costs nearly nothing and helps where the text repeats itself or its prompt.

    Args:
        longest: Most ids to look for; where they are not found, fewer are tried, down to one.
        corpus: Other text to look in, when the ids so far hold no match.

    Raises:
        ValueError: longest is below 1, or corpus holds what is no id.
    """

    def __init__(self, longest: int = 3, corpus: Iterable[int] = ()) -> None:
        self.longest = whole_number("longest", longest)
        self._corpus = "".join(map(chr, check_ids("corpus", corpus, sys.maxunicode + 1)))

    def __call__(self, ids: list[int], n: int) -> list[int]:
        """Return up to n proposed ids; none if even the last id is new."""
        text = "".join(map(chr, ids))  # an id becomes a character: str.rfind is a fast search for sequences
        for size in range(min(self.longest, len(ids)), 0, -1):
            for place, end in ((text, len(text) - 1), (self._corpus, len(self._corpus) - 1)):
                found = place.rfind(text[-size:], 0, end)
                if found >= 0:
                    return [ord(character) for character in place[found + size : found + size + n]]
        return []


class DraftModel:
    """Propose what a smaller model of the same vocabulary would write greedily. It keeps its own caches.

    Args:
        model: A decoder, as for `generate`. Its vocabulary may be padded to another size.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._caches, self._read = model.new_caches(), []  # the ids that the caches hold

    @torch.inference_mode()
    def __call__(self, ids: list[int], n: int) -> list[int]:
        """Return n proposed ids, fewer at the end of the small model's context, none after an id that it lacks."""
        n = min(n, self.model.config.context_length + 1 - len(ids))
        # The caches keep what they have read of these ids; of all ids at least the last is read again.
        n_same = min(len(self._read), len(ids) - 1)
        while self._read[:n_same] != ids[:n_same]:
            n_same -= 1
        for cache in self._caches:
            cache.crop(n_same)
        self._read, unread, proposed = ids[:n_same], ids[n_same:], []
        if max(unread) >= self.model.config.vocab_size:
            return []
        # Greedy decoding, from the first unread id on.
        device = next(self.model.parameters()).device
        with evaluating(self.model):
            step = decode_step(self.model)
            while len(proposed) < n:
                tokens = torch.tensor([unread], device=device)
                if self._read:
                    logits = step(tokens, None, None, self._caches)
                else:
                    logits = self.model(tokens, caches=self._caches, last_only=True)
                newest = logits[0, -1:]
                check_largest(newest.amax(dim=-1))
                self._read, unread = self._read + unread, newest.argmax(dim=-1).tolist()
                proposed += unread
        return proposed
