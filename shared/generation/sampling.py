"""How the next token is chosen: processors that reshape the logits.

A processor is called as processor(ids, logits) and returns new logits; tokens that must not be chosen get
minus infinity. The processors here are frozen dataclasses: they hold settings and no state, so one serves
any number of texts. They follow three rules. Half precision becomes float32 first. Tokens that are
exactly tied are treated alike, whatever order a sort would give them. A row with a finite logit keeps at
least one.

Left out: processors that need a second model or the logits of earlier steps (contrastive search,
Mirostat). Drawing and stopping are the business of shared.generation.engine.

Follows Fan et al. (2018) for top-k, Holtzman et al. (2020) for top-p, Nguyen et al. (2024) for min-p,
Meister et al. (2023) for typical sampling, Keskar et al. (2019) for the repetition penalty.

Explained and proven in ch05_pretraining/02_decoding.ipynb; written from there by `make promote`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.checks import plain_number
from shared.generation.engine import as_float64


def as_float32(logits: Tensor) -> Tensor:
    """Turn half precision into float32, and leave the rest as it is."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def check_number(
    name: str, value: float, low: float, high: float = math.inf, *, kind: type = float
) -> int | float:
    """Return `value` as Python's number; ValueError unless it is from `low` to `high`, and whole if `kind` is int."""
    number = plain_number(value)
    if not isinstance(number, int if kind is int else int | float) or not low <= number <= high:
        noun = "a whole number" if kind is int else "a number"
        limits = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        raise ValueError(f"{name} must be {noun} {limits}, got {value!r}")
    return number


def keep_number(
    settings: object, name: str, low: float, high: float = math.inf, *, kind: type = float
) -> None:
    """Check a field of a frozen dataclass as `check_number` does, and make it a number of Python."""
    number = check_number(name, getattr(settings, name), low, high, kind=kind)
    object.__setattr__(settings, name, number)


# Within these, no finite logit below 1e32 can become infinite.
SMALLEST, LARGEST = 1e-6, 1e6


@dataclass(frozen=True)
class Temperature:
    """Divide the logits by `temperature`: below 1 the distribution sharpens, above 1 it flattens.

    Raises ValueError outside 1e-6 to 1e6. The limit at 0 is the choice of the largest logit.
    """

    temperature: float

    def __post_init__(self) -> None:
        keep_number(self, "temperature", SMALLEST, LARGEST)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        return as_float32(logits) / self.temperature


@dataclass(frozen=True)
class TopK:
    """Keep the `k` largest logits and those tied with the last of them (Fan et al., 2018).

    A `k` of 1 is greedy, a `k` of the vocabulary or more changes nothing. Raises ValueError if `k` is below 1.
    """

    k: int

    def __post_init__(self) -> None:
        keep_number(self, "k", 1, kind=int)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = as_float32(logits)
        last = logits.topk(min(self.k, logits.shape[-1])).values[:, -1:]  # (rows, 1)
        return logits.masked_fill(logits < last, -math.inf)


def _keep_mass(logits: Tensor, order: Tensor, mass: float) -> Tensor:
    """Keep tokens in the order of `order`, smallest first, until their probability together reaches `mass`.

    Tokens tied in `order` with the last one kept are kept too: how a sort arranges equals makes no difference. The sum
    is one of float64: in float32 the rounding of 100,000 terms can move the limit.
    """
    ordered, tokens = order.sort(dim=-1)
    probabilities = as_float64(logits).softmax(dim=-1)
    reached = probabilities.gather(-1, tokens.to(probabilities.device)).cumsum(dim=-1)  # (rows, vocab_size)
    last = (reached < mass).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    too_far = order > ordered.gather(-1, last.to(order.device))
    return logits.masked_fill(too_far.to(logits.device), -math.inf)


@dataclass(frozen=True)
class TopP:
    """Keep the fewest most probable tokens whose probability reaches `p`, and ties (Holtzman et al., 2020).

    A `p` of 1 changes nothing. Raises ValueError outside 1e-6 to 1.
    """

    p: float

    def __post_init__(self) -> None:
        keep_number(self, "p", SMALLEST, 1)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = as_float32(logits)
        # A sum that rounds to 1 too early must not cut the tail.
        return logits if self.p == 1 else _keep_mass(logits, -logits, self.p)


@dataclass(frozen=True)
class MinP:
    """Keep tokens at least `p` times as probable as the most probable one (Nguyen et al., 2024).

    0 changes nothing, 1 keeps the favourite and its equals. Raises ValueError outside 0 to 1.
    """

    p: float

    def __post_init__(self) -> None:
        keep_number(self, "p", 0, 1)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = as_float32(logits)
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
        keep_number(self, "mass", SMALLEST, 1)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = as_float32(logits)
        if self.mass == 1:
            return logits
        surprise = -as_float64(logits).log_softmax(dim=-1)
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
        keep_number(self, "penalty", SMALLEST, LARGEST)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = as_float32(logits)
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
        keep_number(self, "presence", -LARGEST, LARGEST)
        keep_number(self, "frequency", -LARGEST, LARGEST)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = as_float32(logits)
        times = torch.zeros_like(logits).scatter_add_(1, ids, logits.new_ones(ids.shape))
        return logits - self.frequency * times - self.presence * times.clamp(max=1)


@dataclass(frozen=True)
class NoRepeatNGram:
    """Forbid tokens that would complete a sequence of `n` tokens that the row holds already.

    A row that would have nothing left stays as it is. Raises ValueError if `n` is below 1.
    """

    n: int

    def __post_init__(self) -> None:
        keep_number(self, "n", 1, kind=int)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = as_float32(logits)
        if ids.shape[1] < self.n:
            return logits
        grams = ids.unfold(1, self.n, 1)  # (rows, tokens - n + 1, n)
        latest = ids[:, None, ids.shape[1] - self.n + 1 :]  # (rows, 1, n - 1)
        rows, places = (grams[..., :-1] == latest).all(dim=-1).nonzero(as_tuple=True)
        banned = torch.zeros_like(logits, dtype=torch.bool)
        banned[rows, grams[rows, places, -1]] = True
        has_others = (logits > -math.inf).logical_and(~banned).any(dim=-1, keepdim=True)
        return logits.masked_fill(banned & has_others, -math.inf)
