"""Attacks on a text classifier by its spelling, and training against shifts of its embeddings.

Left out: attackers who know the weights, attacks in other words than those given, and any proof that no
attack is left.

Follows Miyato, Dai and Goodfellow (2017, "Adversarial Training Methods for Semi-Supervised Text
Classification") and Madry et al. (2018, "Towards Deep Learning Models Resistant to Adversarial Attacks").

Explained and proven in ch06_classification/03_robustness.ipynb; written from there by `make promote`.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from shared.checks import check_text, require, whole_number
from shared.finetuning.augmentation import WORD

Edit = Callable[[str, random.Random], str]


def _long_words(text: str, shortest: int = 4) -> list[tuple[int, int]]:
    """Start and end of each word of at least so many letters."""
    return [match.span() for match in WORD.finditer(text) if match.end() - match.start() >= shortest]


def swap_letters(text: str, rng: random.Random) -> str:
    """Exchange two neighbours inside one word of at least four letters; the first and the last letter stay."""
    places = _long_words(text)
    if not places:
        return text
    start, end = rng.choice(places)
    at = rng.randrange(start + 1, end - 2)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def look_alikes(table: Mapping[str, str]) -> Edit:
    """Return the edit that writes one letter of a text in another way; a table has the ways for each letter."""

    def edit(text: str, rng: random.Random) -> str:
        places = [i for i, letter in enumerate(text) if letter in table]
        if not places:
            return text
        at = rng.choice(places)
        return text[:at] + rng.choice(table[text[at]]) + text[at + 1 :]

    return edit


def insert_marks(marks: Sequence[str]) -> Edit:
    """Return the edit that puts one of some marks, such as a space, into one word of at least four letters."""

    def edit(text: str, rng: random.Random) -> str:
        places = _long_words(text)
        if not places:
            return text
        start, end = rng.choice(places)
        at = rng.randrange(start + 1, end)
        return text[:at] + rng.choice(marks) + text[at:]

    return edit


def append_words(words: Sequence[str]) -> Edit:
    """Return the edit that adds one of some words, or short phrases, at the end of a text."""
    return lambda text, rng: f"{text} {rng.choice(words)}"


@dataclass(frozen=True)
class Attacked:
    """A text after an attack: its words, what the classifier gives it now, the edits made and the queries spent."""

    text: str
    score: float
    n_edits: int
    n_queries: int


def attack(
    text: str,
    edit: Edit,
    score: Callable[[list[str]], Sequence[float]],
    *,
    rng: random.Random,
    budget: int = 48,
    width: int = 8,
    goal: float = 0.5,
) -> Attacked:
    """Change a text step by step until a classifier gives it a score below `goal`, or the budget is spent.

    In each step `width` ways to make one edit more are tried on the classifier itself; the one with the lowest score
    goes on, if it is lower than before. So an attacker needs no weights, only answers.

    Args:
        text: What the classifier should no longer recognise.
        edit: Makes one small change.
        score: Texts to scores, such as the probability of spam.
        budget: Most texts that the classifier may be asked about; the text itself is one of them.

    Raises:
        ValueError: `budget` or `width` is below 1.
    """
    check_text("text", text)
    budget, width = whole_number("budget", budget), whole_number("width", width)
    best, n_edits, n_queries = float(score([text])[0]), 0, 1
    while best >= goal and n_queries < budget:
        tried = [edit(text, rng) for _ in range(min(width, budget - n_queries))]
        scores = [float(value) for value in score(tried)]
        n_queries += len(tried)
        lowest = min(range(len(tried)), key=scores.__getitem__)
        if scores[lowest] < best:
            text, best, n_edits = tried[lowest], scores[lowest], n_edits + 1
    return Attacked(text, best, n_edits, n_queries)


class EmbeddingShift:
    """While it is open, a shift is added to what an embedding gives; no weight is touched.

    Args:
        embedding: The module; its output is (batch, tokens, emb_dim).
        shift: Of the same shape.
    """

    def __init__(self, embedding: nn.Module, shift: Tensor) -> None:
        self.embedding, self.shift = embedding, shift

    def __enter__(self) -> "EmbeddingShift":
        self._handle = self.embedding.register_forward_hook(lambda module, inputs, out: out + self.shift)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()


def text_norms(shift: Tensor) -> Tensor:
    """Return the length of each text's shift, over all its tokens: (batch, tokens, emb_dim) -> (batch, 1, 1)."""
    return shift.flatten(1).norm(dim=1)[:, None, None]


def worst_shift(
    loss: Callable[[], Tensor],
    embedding: nn.Module,
    shape: tuple[int, int, int],
    *,
    epsilon: float,
    n_steps: int = 1,
) -> Tensor:
    """Return a shift of the embeddings, for each text of length at most `epsilon`, that makes the loss large.

    With one step it is FGM (Miyato, Dai and Goodfellow, 2017, "Adversarial Training Methods for Semi-Supervised Text
    Classification"): along the gradient, of length `epsilon`. With more it is PGD (Madry et al., 2018, "Towards Deep
    Learning Models Resistant to Adversarial Attacks"): steps of 2.5 epsilon / n_steps, each followed by a pull back
    into the ball. A text without a gradient keeps a shift of zeros. Weights and their gradients stay as they are.

    Args:
        loss: Computes the summed loss of a batch; it is called `n_steps` times.
        embedding: Whose output is shifted.
        shape: Of that output, (batch, tokens, emb_dim).

    Raises:
        ValueError: `epsilon` is not above 0 and finite, or `n_steps` below 1.
    """
    require("epsilon", epsilon, 0 < epsilon < math.inf, "above 0")
    n_steps = whole_number("n_steps", n_steps)
    weight = next(embedding.parameters())
    shift = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
    step = epsilon if n_steps == 1 else 2.5 * epsilon / n_steps
    for _ in range(n_steps):
        shift.requires_grad_(True)
        with EmbeddingShift(embedding, shift):
            (gradient,) = torch.autograd.grad(loss(), shift)
        norm = text_norms(gradient)
        shift = shift.detach() + torch.where(norm > 0, step * gradient / norm.clamp(min=1e-30), 0.0)
        # Back into the ball, where the step left it.
        shift = shift * (epsilon / text_norms(shift).clamp(min=1e-30)).clamp(max=1.0)
    return shift


Loss = Callable[[nn.Module, tuple[Tensor, Tensor], Tensor], Tensor]


def adversarial_loss(loss: Loss, *, epsilon: float, n_steps: int = 1) -> Loss:
    """Return a loss for a `GPTClassifier`: the mean of the loss on the texts, and under the worst shift found for them.

    Args:
        loss: Of a model, its inputs (ids and mask) and targets, summed.
        epsilon, n_steps: See `worst_shift`.
    """

    def both(model: nn.Module, inputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        embedding = model.body.token_embedding
        shape = (*inputs[0].shape, model.body.config.emb_dim)
        shift = worst_shift(
            lambda: loss(model, inputs, targets), embedding, shape, epsilon=epsilon, n_steps=n_steps
        )
        with EmbeddingShift(embedding, shift):
            shifted = loss(model, inputs, targets)
        return (loss(model, inputs, targets) + shifted) / 2

    return both
