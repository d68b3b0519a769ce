"""How the next token is chosen: processors that reshape the logits, and beam search.

A processor is called as processor(ids, logits) and returns new logits; tokens that must not be chosen get
minus infinity. The processors here are frozen dataclasses: they hold settings and no state, so one serves
any number of texts. They follow three rules. Half precision becomes float32 first. Tokens that are
exactly tied are treated alike, whatever order a sort would give them. A row with a finite logit keeps at
least one.

Left out: processors that need a second model or the logits of earlier steps (contrastive search,
Mirostat), sampling within a beam, beams for several prompts at once. Drawing and stopping are the
business of shared.generation.engine.

Follows Fan et al. (2018) for top-k, Holtzman et al. (2020) for top-p, Nguyen et al. (2024) for min-p,
Meister et al. (2023) for typical sampling, Keskar et al. (2019) for the repetition penalty, Wu et al.
(2016) for a beam search whose scores depend on length.

Explained and proven in ch05_pretraining/02_decoding.ipynb; written from there by `make promote`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shared.generation.engine import Processor, check_prompts, evaluating
from shared.model.seq2seq import Hypothesis


def process(processors: Sequence[Processor], ids: Tensor, logits: Tensor) -> Tensor:
    """Return logits (rows, vocab_size) after all processors, the first one first.

    `ids` (rows, tokens), int64, are the tokens so far; a row needs at least one finite logit. Raises ValueError if a
    shape or type does not fit.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floats (rows, vocab_size), got {logits.dtype} {tuple(logits.shape)}"
        )
    if ids.dim() != 2 or len(ids) != len(logits) or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 ({len(logits)}, tokens), got {ids.dtype} {tuple(ids.shape)}")
    for processor in processors:
        logits = processor(ids, logits)
    return logits


def _widen(logits: Tensor) -> Tensor:
    """Turn half precision into float32."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _check(name: str, value: float, low: float, high: float = math.inf, *, kind: type = float) -> None:
    """Raise ValueError unless `value` is a number from `low` to `high`, a whole one if `kind` is int."""
    is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        noun = "a whole number" if kind is int else "a number"
        limits = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        raise ValueError(f"{name} must be {noun} {limits}, got {value!r}")


# Within these, no finite logit below 1e32 can become infinite.
SMALLEST, LARGEST = 1e-6, 1e6


@dataclass(frozen=True)
class Temperature:
    """Divide the logits by `temperature`: below 1 the distribution sharpens, above 1 it flattens.

    Raises ValueError outside 1e-6 to 1e6. The limit at 0 is the choice of the largest logit.
    """

    temperature: float

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, SMALLEST, LARGEST)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        return _widen(logits) / self.temperature


@dataclass(frozen=True)
class TopK:
    """Keep the `k` largest logits and those tied with the last of them (Fan et al., 2018).

    A `k` of 1 is greedy, a `k` of the vocabulary or more changes nothing. Raises ValueError if `k` is below 1.
    """

    k: int

    def __post_init__(self) -> None:
        _check("k", self.k, 1, kind=int)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = _widen(logits)
        last = logits.topk(min(self.k, logits.shape[-1])).values[:, -1:]  # (rows, 1)
        return logits.masked_fill(logits < last, -math.inf)


def _keep_mass(logits: Tensor, order: Tensor, mass: float) -> Tensor:
    """Keep tokens in the order of `order`, smallest first, until their probability together reaches `mass`.

    Tokens tied in `order` with the last one kept are kept too: how a sort arranges equals makes no difference.
    """
    ordered, tokens = order.sort(dim=-1)
    reached = logits.softmax(dim=-1).gather(-1, tokens).cumsum(dim=-1)  # (rows, vocab_size)
    last = (reached < mass).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill(order > ordered.gather(-1, last), -math.inf)


@dataclass(frozen=True)
class TopP:
    """Keep the fewest most probable tokens whose probability reaches `p`, and ties (Holtzman et al., 2020).

    A `p` of 1 changes nothing. Raises ValueError outside 1e-6 to 1.
    """

    p: float

    def __post_init__(self) -> None:
        _check("p", self.p, SMALLEST, 1)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = _widen(logits)
        # A sum that rounds to 1 too early must not cut the tail.
        return logits if self.p == 1 else _keep_mass(logits, -logits, self.p)


@dataclass(frozen=True)
class MinP:
    """Keep tokens at least `p` times as probable as the most probable one (Nguyen et al., 2024).

    0 changes nothing, 1 keeps the favourite and its equals. Raises ValueError outside 0 to 1.
    """

    p: float

    def __post_init__(self) -> None:
        _check("p", self.p, 0, 1)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = _widen(logits)
        if self.p == 0:
            return logits
        least = logits.amax(dim=-1, keepdim=True) + math.log(self.p)
        return logits.masked_fill(logits < least, -math.inf)


@dataclass(frozen=True)
class Typical:
    """Keep the tokens whose surprise is nearest to the mean surprise, up to a probability of `mass`, and ties.

    Locally typical sampling (Meister et al., 2023). A `mass` of 1 changes nothing. Raises ValueError outside 1e-6 to 1.
    """

    mass: float

    def __post_init__(self) -> None:
        _check("mass", self.mass, SMALLEST, 1)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = _widen(logits)
        if self.mass == 1:
            return logits
        surprise = -logits.log_softmax(dim=-1)
        mean = torch.special.entr((-surprise).exp()).sum(dim=-1, keepdim=True)  # the entropy, (rows, 1)
        return _keep_mass(logits, (surprise - mean).abs(), self.mass)


@dataclass(frozen=True)
class RepetitionPenalty:
    """Make tokens seen so far less probable: positive logits / `penalty`, negative ones * `penalty`.

    Keskar et al. (2019). The prompt counts as seen. It depends on where the logits have their zero: adding a
    constant to all of them changes its effect. 1 does nothing, below 1 it rewards. Raises ValueError outside 1e-6 to
    1e6.
    """

    penalty: float

    def __post_init__(self) -> None:
        _check("penalty", self.penalty, SMALLEST, LARGEST)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = _widen(logits)
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
        punished = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return torch.where(seen, punished, logits)


@dataclass(frozen=True)
class CountPenalty:
    """Subtract `presence` from the logits of tokens seen so far, and `frequency` once for each time they were seen.

    The prompt counts as seen. Negative values reward. Raises ValueError outside -1e6 to 1e6.
    """

    presence: float = 0.0
    frequency: float = 0.0

    def __post_init__(self) -> None:
        _check("presence", self.presence, -LARGEST, LARGEST)
        _check("frequency", self.frequency, -LARGEST, LARGEST)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = _widen(logits)
        times = torch.zeros_like(logits).scatter_add_(1, ids, logits.new_ones(ids.shape))
        return logits - self.frequency * times - self.presence * times.clamp(max=1)


@dataclass(frozen=True)
class NoRepeatNGram:
    """Forbid tokens that would complete a sequence of `n` tokens that the row holds already.

    A row that would have nothing left stays as it is. Raises ValueError if `n` is below 1.
    """

    n: int

    def __post_init__(self) -> None:
        _check("n", self.n, 1, kind=int)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = _widen(logits)
        if ids.shape[1] < self.n:
            return logits
        grams = ids.unfold(1, self.n, 1)  # (rows, tokens - n + 1, n)
        latest = ids[:, None, ids.shape[1] - self.n + 1 :]  # (rows, 1, n - 1)
        rows, places = (grams[..., :-1] == latest).all(dim=-1).nonzero(as_tuple=True)
        banned = torch.zeros_like(logits, dtype=torch.bool)
        banned[rows, grams[rows, places, -1]] = True
        has_others = (logits > -math.inf).logical_and(~banned).any(dim=-1, keepdim=True)
        return logits.masked_fill(banned & has_others, -math.inf)


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
        ValueError: An argument is out of range (it is named), or the context does not suffice.
    """
    _check("beam_size", beam_size, 1, kind=int)
    _check("length_penalty", length_penalty, -10, 10)
    if end_token is not None:
        _check("end_token", end_token, 0, model.config.vocab_size - 1, kind=int)
    [prompt] = check_prompts(model, [prompt], max_new_tokens)
    finished: list[Hypothesis] = []
    with evaluating(model):
        ids = torch.tensor([prompt], device=next(model.parameters()).device)
        caches = model.new_caches(len(prompt) + max_new_tokens)
        logits = model(ids, last_only=True, caches=caches)[:, -1]
        totals = torch.zeros(1, 1, device=ids.device)  # log-probabilities of the beam, (beam, 1)
        for length in range(1, max_new_tokens + 1):
            scores = totals + process(processors, ids, _widen(logits)).log_softmax(
                dim=-1
            )  # (beam, vocab_size)
            best = scores.flatten().topk(min(2 * beam_size, scores.numel()))
            rows, tokens = best.indices // scores.shape[1], best.indices % scores.shape[1]
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
            most_favourable = max_new_tokens if length_penalty > 0 else length + 1
            bound = best.values[running[0]].item() / most_favourable**length_penalty
            if len(finished) == beam_size and bound <= beam_score(finished[-1], length_penalty):
                break
            kept = torch.tensor(running[:beam_size], device=ids.device)
            ids = torch.cat([ids[rows[kept]], tokens[kept, None]], dim=1)
            totals = best.values[kept, None]
            for cache in caches:
                cache.reorder(rows[kept])
            logits = model(ids[:, -1:], last_only=True, caches=caches)[:, -1]
    return finished
