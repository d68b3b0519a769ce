"""Beam search for a decoder: the continuations of a prompt that have the best scores, among those that a
beam finds.

The beam stays full: finished texts move to a list of their own. Scores are log-probabilities divided by a
power of the length. Caches are reordered, never copied by hand.

Left out: sampling within a beam, beams for several prompts at once.

Follows Wu et al. (2016) for a beam search whose scores depend on length.

Explained and proven in ch05_pretraining/02_decoding.ipynb; written from there by `make promote`.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from shared.generation.engine import (
    Processor,
    apply_processors,
    as_float64,
    check_largest,
    check_prompts,
    evaluating,
)
from shared.generation.sampling import as_float32, check_number
from shared.model.seq2seq import Hypothesis


def beam_score(hypothesis: Hypothesis, length_penalty: float) -> float:
    """Return log-probability / length ** length_penalty, where the length counts the end token if there is one."""
    return hypothesis.log_probability / (len(hypothesis.ids) + hypothesis.finished) ** length_penalty


@torch.inference_mode()
def beam_search(
    model: nn.Module,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    beam_size: int,
    end_token: int | None = None,
    length_penalty: float = 1.0,
    processors: Sequence[Processor] = (),
) -> list[Hypothesis]:
    """Return the up to `beam_size` best continuations of a prompt that a beam search finds, the best score first.

    A beam of 1 is greedy decoding; a beam that is never full is complete enumeration. Equal scores come in no
    particular order.

    Args:
        model: A decoder as `generate` needs it; it runs in evaluation mode.
        prompt: Ids of the tokens to continue.
        max_new_tokens: Most ids to add; what has not ended by then competes unfinished.
        beam_size: Unfinished continuations that are followed at a time.
        end_token: Ends a continuation; it is not part of the returned ids.
        length_penalty: The exponent of `beam_score`: above 0 it helps long continuations, below 0 short ones.
        processors: Applied to the logits; probabilities are those of the softmax after them.

    Raises:
        ValueError: An argument is out of range (it is named), the context does not suffice, or the logits of a
            beginning allow no choice (`check_largest`).
    """
    # What is refused, before anything is computed.
    beam_size = check_number("beam_size", beam_size, 1, kind=int)
    length_penalty = check_number("length_penalty", length_penalty, -10, 10)
    if end_token is not None:
        end_token = check_number("end_token", end_token, 0, model.config.vocab_size - 1, kind=int)
    [prompt], max_new_tokens = check_prompts(model, [prompt], max_new_tokens)
    processors = tuple(processors)
    finished: list[Hypothesis] = []
    with evaluating(model):
        # The beam begins as one row: the prompt, read once.
        ids = torch.tensor([prompt], device=next(model.parameters()).device)
        caches = model.new_caches(len(prompt) + max_new_tokens - 1)  # the last token is never read
        logits = model(ids, last_only=True, caches=caches)[:, -1]
        totals = 0.0  # log-probabilities of the beam, float64 (beam, 1)
        for length in range(1, max_new_tokens + 1):
            # Every beginning is extended by every token; the best are looked at, twice as many as the beam holds.
            processed = apply_processors(processors, ids, as_float32(logits))
            check_largest(processed.amax(dim=-1))
            scores = totals + as_float64(processed).log_softmax(dim=-1)  # (beam, vocab_size)
            best = scores.flatten().topk(min(2 * beam_size, scores.numel()))
            indices = best.indices.to(ids.device)
            rows, tokens = indices // scores.shape[1], indices % scores.shape[1]
            # They either go on, or have ended and count if they are among the best `beam_size`.
            running = []
            for place, (total, token) in enumerate(zip(best.values.tolist(), tokens.tolist(), strict=True)):
                if total == -math.inf:
                    break
                ended = token == end_token
                if not ended and length < max_new_tokens:
                    running.append(place)
                elif place < beam_size:
                    new = [*ids[rows[place], len(prompt) :].tolist(), *([] if ended else [token])]
                    finished.append(Hypothesis(tuple(new), total, ended))
            finished.sort(key=lambda hypothesis: -beam_score(hypothesis, length_penalty))
            del finished[beam_size:]
            if not running:
                break
            # Nothing can win any more when even the most favourable length leaves the best beginning behind.
            most_favorable = max_new_tokens if length_penalty > 0 else length + 1
            bound = best.values[running[0]].item() / most_favorable**length_penalty
            if len(finished) == beam_size and bound <= beam_score(finished[-1], length_penalty):
                break
            # The best beginnings go on, each with the keys and values of its parent.
            kept = torch.tensor(running[:beam_size], device=ids.device)
            ids = torch.cat([ids[rows[kept]], tokens[kept, None]], dim=1)
            totals = best.values[running[:beam_size], None]
            for cache in caches:
                cache.reorder(rows[kept])
            logits = model(ids[:, -1:], last_only=True, caches=caches)[:, -1]
    return finished
