"""How probable given answers are for a model: perplexity of references, and multiple choice.

Prompt and answer are encoded apart; each prompt is read once, and its answers continue from the same keys
and values. The output head is asked at the places of answers only, 256 at a time, so that long answers
need little memory.

Left out: prompts that share a beginning, which is read again for each.

Follows Holtzman et al. (2021, "Surface Form Competition: Why the Highest Probability Answer Isn't Always
Right") for scores less those without the question.

Explained and proven in ch07_instruction/02_evaluation.ipynb; written from there by `make promote`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shared.checks import check_choice, require, whole_number
from shared.finetuning.features import pad_inputs
from shared.generation.engine import evaluating
from shared.generation.streaming import Tokenizer
from shared.model.gpt import GPTModel
from shared.training.losses import bits_per_byte, perplexity


@dataclass(frozen=True)
class Likelihood:
    """How surprising an answer is after its prompt: -log p of the whole answer, its tokens, its UTF-8 bytes."""

    nats: float
    n_tokens: int
    n_bytes: int

    @property
    def perplexity(self) -> float:
        """e to the loss per token; comparable between models with the same tokenizer only."""
        return perplexity(self.nats / self.n_tokens)

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte of the text; comparable between all models that read text."""
        return bits_per_byte(self.nats, self.n_bytes)


def pooled(likelihoods: Iterable[Likelihood]) -> Likelihood:
    """Return the likelihood of several answers taken together, so that each token, or byte, counts once.

    Raises ValueError if there is none.
    """
    found = list(likelihoods)
    require("likelihoods", len(found), len(found) > 0, "at least one")
    return Likelihood(
        math.fsum(one.nats for one in found),
        sum(one.n_tokens for one in found),
        sum(one.n_bytes for one in found),
    )


def _check_answers(
    model: GPTModel, prompts: Sequence[Sequence[int]], ids: Sequence[Sequence[Sequence[int]]]
) -> None:
    """Refuse what `answer_likelihoods` cannot read, with its place (ValueError)."""
    limit = model.config.context_length
    require("answers", len(ids), len(ids) == len(prompts), f"{len(prompts)} lists, one for each prompt")
    for i, (prompt, rows) in enumerate(zip(prompts, ids, strict=True)):
        require(f"prompts[{i}]", list(prompt), len(prompt) > 0, "at least one token")
        require(f"answers[{i}]", list(rows), len(rows) > 0, "at least one answer")
        for k, row in enumerate(rows):
            length = len(prompt) + len(row)
            require(f"answers[{i}][{k}]", "an empty text", len(row) > 0, "at least one token")
            require(
                f"prompt and answers[{i}][{k}]",
                f"{length:,} tokens",
                length <= limit,
                f"at most {limit:,} tokens",
            )


@torch.no_grad()
def _answer_losses(
    model: GPTModel, prompts: Sequence[Sequence[int]], ids: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """Return -log p of each answer for prompts of one length, each of which is read once."""
    device = next(model.parameters()).device
    rows = [row for of_prompt in ids for row in of_prompt]
    which = torch.arange(len(ids), device=device).repeat_interleave(
        torch.tensor([len(of_prompt) for of_prompt in ids], device=device)
    )
    tokens, mask = (part.to(device) for part in pad_inputs(rows))
    # The prompts, once; then as many copies of their keys and values as they have answers.
    caches = model.new_caches(len(prompts[0]) + tokens.shape[1])
    states = model.hidden_states(torch.tensor([list(p) for p in prompts], device=device), caches=caches)
    for cache in caches:
        cache.reorder(which)
    # The state before each token predicts it: the prompt's last one, then those of the answer but its last.
    states = states[which, -1:]
    if tokens.shape[1] > 1:
        states = torch.cat([states, model.hidden_states(tokens[:, :-1], caches=caches)], dim=1)
    losses = [
        F.cross_entropy(model.output_head(some).float(), wanted, reduction="none").cpu().double()
        for some, wanted in zip(states[mask].split(256), tokens[mask].split(256), strict=True)
    ]
    nats = iter([part.sum().item() for part in torch.cat(losses).split([len(row) for row in rows])])
    return [[next(nats) for _ in of_prompt] for of_prompt in ids]


def answer_likelihoods(
    model: GPTModel,
    encoding: Tokenizer,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[str]],
    *,
    end: Sequence[int] = (),
    batch_size: int = 16,
) -> list[list[Likelihood]]:
    """Return how probable each answer is after its prompt, for several answers to each of several prompts.

    Prompt and answer are encoded apart, so the prompt's ids are the same before every answer.

    Args:
        model: A decoder; it runs without dropout and gradients.
        encoding: Its tokenizer.
        prompts: The ids of each prompt, at least one each.
        answers: For each prompt its answers, as they stand in the text (often with a space in front).
        end: Ids that must follow each answer, such as the end of a message; they count as tokens, not as bytes.
        batch_size: Prompts of one length that are read at a time.

    Raises:
        ValueError: The numbers do not fit, a prompt or an answer is empty, or both are longer than the context.
    """
    batch_size = whole_number("batch_size", batch_size)
    ids = [[[*encoding.encode_ordinary(text), *end] for text in of_prompt] for of_prompt in answers]
    _check_answers(model, prompts, ids)
    by_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(place)
    found: list[list[Likelihood]] = [[] for _ in prompts]
    with evaluating(model):
        for places in by_length.values():
            for start in range(0, len(places), batch_size):
                some = places[start : start + batch_size]
                losses = _answer_losses(model, [prompts[i] for i in some], [ids[i] for i in some])
                for i, nats in zip(some, losses, strict=True):
                    found[i] = [
                        Likelihood(loss, len(row), len(text.encode()))
                        for loss, row, text in zip(nats, ids[i], answers[i], strict=True)
                    ]
    return found


NORMALIZATIONS = ("sum", "token", "byte", "unconditional")


def choice_scores(
    likelihoods: Sequence[Likelihood],
    normalization: str = "sum",
    unconditional: Sequence[Likelihood] | None = None,
) -> list[float]:
    """Return a score for each of several answers to one question; the highest is the model's choice.

    Args:
        likelihoods: Of each answer after the question.
        normalization: "sum", log p of the answer; per "token"; per "byte"; or "unconditional", log p less the log p of
            the answer after a prompt without the question.
        unconditional: Of each answer after that prompt; for "unconditional" only.

    Raises:
        ValueError: The normalization is unknown, or the unconditional likelihoods are missing or not as many.
    """
    check_choice("normalization", normalization, NORMALIZATIONS)
    if normalization == "unconditional":
        n_given = None if unconditional is None else len(unconditional)
        require("unconditional", n_given, n_given == len(likelihoods), f"{len(likelihoods)} likelihoods")
        return [other.nats - one.nats for one, other in zip(likelihoods, unconditional, strict=True)]
    sizes = {"sum": lambda one: 1, "token": lambda one: one.n_tokens, "byte": lambda one: one.n_bytes}
    return [-one.nats / sizes[normalization](one) for one in likelihoods]
