"""Attacks on texts by changes of their spelling, with a budget of questions, and training against the worst
shift of the embeddings.

Left out: attacks that know the weights and change tokens, replacement by synonyms, other norms than L2,
and guarantees: what stood one attack may fall to the next.

Follows Miyato, Dai and Goodfellow (2017, "Adversarial Training Methods for Semi-Supervised Text
Classification") and Madry, Makelov, Schmidt, Tsipras and Vladu (2018, "Towards Deep Learning Models
Resistant to Adversarial Attacks").

Explained and proven in ch06_classification/03_robustness.ipynb; written from there by `make promote`.
"""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.checks import check_several, check_text, require, whole_number
from shared.finetuning.tuning import GPTClassifier

LETTERS = re.compile(r"[^\W\d_]+")


def swap_letters(text: str, rng: random.Random) -> str:
    """Exchange two neighbouring inner letters of a word; the text as it is if no word has two different ones.

    Raises TypeError if `text` is no string.
    """
    check_text("text", text)
    places = [
        i
        for word in LETTERS.finditer(text)
        for i in range(word.start() + 1, word.end() - 2)
        if text[i] != text[i + 1]
    ]
    if not places:
        return text
    i = rng.choice(places)
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def replace_letter(text: str, rng: random.Random, table: Mapping[str, str]) -> str:
    """Replace a letter by a character that looks like it; the text as it is if none of its letters is in the table.

    Args:
        table: For a letter in lower case, the characters that may stand for it.

    Raises:
        TypeError: `text` is no string.
    """
    check_text("text", text)
    places = [i for i, char in enumerate(text) if char.lower() in table]
    if not places:
        return text
    i = rng.choice(places)
    return text[:i] + rng.choice(table[text[i].lower()]) + text[i + 1 :]


def insert_mark(text: str, rng: random.Random, marks: str) -> str:
    """Put a mark, such as a space or a dot, between two letters of a word; the text as it is if it has no such place.

    Raises:
        ValueError: There is no mark.
        TypeError: `text` is no string.
    """
    check_text("text", text)
    require("marks", marks, len(marks) > 0, "at least one character")
    places = [i for word in LETTERS.finditer(text) for i in range(word.start() + 1, word.end())]
    if not places:
        return text
    i = rng.choice(places)
    return text[:i] + rng.choice(marks) + text[i:]


def append_word(text: str, rng: random.Random, words: Sequence[str]) -> str:
    """Put one of the words at the end of a text.

    Raises:
        ValueError: There is no word.
        TypeError: `text` is no string.
    """
    check_text("text", text)
    require("words", len(words), len(words) > 0, "at least one")
    return f"{text} {rng.choice(words)}"


Change = Callable[[str, random.Random], str]


@dataclass(frozen=True)
class Attacked:
    """How the attack on a text ended: the best text found, its score, the changes in it, and the questions asked."""

    text: str
    score: float
    n_changes: int
    n_queries: int


def change_often(text: str, change: Change, n: int, rng: random.Random) -> str:
    """Return a text after `n` changes, one after the other."""
    for _ in range(n):
        text = change(text, rng)
    return text


def attack(
    texts: Sequence[str],
    score: Callable[[list[str]], Sequence[float]],
    change: Change,
    *,
    n_queries: int = 64,
    width: int = 8,
    threshold: float = 0.5,
    seed: int = 0,
) -> list[Attacked]:
    """Change each text, step by step, until its score is below a threshold or the queries are used up.

    In each step `width` changed texts are scored, and the one with the lowest score is kept if it is lower than
    before: a greedy search that needs nothing but scores. A text that begins below the threshold is left as it is.

    Args:
        texts: What is to be taken for something else.
        score: For a list of texts, how probable each is in the eyes of the model that is attacked.
        change: Makes one change; `change_often` and `functools.partial` build others from it.
        n_queries: Most changed texts that are scored for each text.
        width: How many of them in one step.

    Raises:
        ValueError: `n_queries` or `width` is below 1, or `width` above `n_queries`.
        TypeError: `texts` is one text, or holds something else.
    """
    check_several("texts", texts)
    n_queries, width = whole_number("n_queries", n_queries), whole_number("width", width)
    require("width", width, width <= n_queries, f"at most n_queries={n_queries}")
    if not texts:
        return []
    state = [
        Attacked(text, float(found), 0, 0) for text, found in zip(texts, score(list(texts)), strict=True)
    ]
    rngs = [random.Random(f"{seed} {text}") for text in texts]
    for _ in range(n_queries // width):
        # A few candidates for each text that is still recognised, all scored at once.
        active = [i for i, one in enumerate(state) if one.score >= threshold]
        if not active:
            break
        candidates = [[change(state[i].text, rngs[i]) for _ in range(width)] for i in active]
        found = np.asarray(score([text for group in candidates for text in group])).reshape(-1, width)
        for i, group, scores in zip(active, candidates, found, strict=True):
            best, before = int(scores.argmin()), state[i]
            text, lowest, n = before.text, before.score, before.n_changes
            if scores[best] < lowest:
                text, lowest, n = group[best], float(scores[best]), n + 1
            state[i] = Attacked(text, lowest, n, before.n_queries + width)
    return state


def of_length(gradient: Tensor, radius: float) -> Tensor:
    """Return each text's gradient (batch, tokens, emb_dim) with the length `radius`; a gradient of zeros stays."""
    norm = gradient.flatten(1).norm(dim=1)[:, None, None]
    return torch.where(norm > 0, radius * gradient / norm.clamp(min=torch.finfo(norm.dtype).tiny), 0.0)


def worst_shift(
    classifier: GPTClassifier,
    embedded: Tensor,
    mask: Tensor,
    targets: Tensor,
    *,
    radius: float,
    n_steps: int = 1,
) -> Tensor:
    """Return a shift of embedded tokens that raises the loss as much as steps along the gradient can: as `embedded`.

    One step is FGM (Miyato, Dai and Goodfellow, 2017), several are PGD (Madry and others, 2018): each is 1.5 * radius /
    n_steps long, and what leaves the ball is brought back to its surface. It begins at zero, not at random.

    Args:
        embedded: (batch, tokens, emb_dim).
        mask: Bool (batch, tokens); padding gets no shift.
        targets: int64 (batch,).
        radius: The largest L2 norm of a text's shift, over all its tokens.

    Raises:
        ValueError: `radius` is not above 0, or `n_steps` below 1.
    """
    require("radius", radius, 0 < radius < math.inf, "above 0")
    n_steps = whole_number("n_steps", n_steps)
    still, shift = embedded.detach(), torch.zeros_like(embedded)
    step = radius if n_steps == 1 else 1.5 * radius / n_steps
    for _ in range(n_steps):
        # The gradient for the embeddings alone: that of the weights is neither computed nor changed.
        shift.requires_grad_(True)
        loss = F.cross_entropy(classifier((still + shift, mask)), targets, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, shift)
        shift = shift.detach() + of_length(gradient * mask[:, :, None], step)
        # Back into the ball.
        norm = shift.flatten(1).norm(dim=1)[:, None, None]
        shift = torch.where(norm > radius, of_length(shift, radius), shift)
    return shift


def adversarial_loss(
    classifier: GPTClassifier,
    inputs: tuple[Tensor, Tensor],
    targets: Tensor,
    *,
    radius: float,
    n_steps: int = 1,
) -> Tensor:
    """Return the sum of -log p(label) over a batch, half as it is, half with the embeddings shifted for the worst.

    For `fine_tune`, with `functools.partial(adversarial_loss, radius=...)`. A step costs about 2 + `n_steps` passes
    instead of one. The embedding matrix is never changed, so nothing must be restored.

    Args:
        inputs: Ids (batch, tokens) and their mask.
        targets: int64 (batch,).
        radius, n_steps: See `worst_shift`, where the errors stand too.
    """
    tokens, mask = inputs
    embedded = classifier.body.token_embedding(tokens)
    shift = worst_shift(classifier, embedded, mask, targets, radius=radius, n_steps=n_steps)
    losses = [
        F.cross_entropy(classifier((states, mask)), targets, reduction="sum")
        for states in (embedded, embedded + shift)
    ]
    return (losses[0] + losses[1]) / 2
