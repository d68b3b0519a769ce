"""A GPT with a classification head in place of its output head, and its training in part or whole.

`GPTClassifier` takes rows of ids, or the cached states of a frozen lower part, with a mask. `fine_tune`
is the one training loop of `shared.training.loop` with early stopping. `prompted_logits` asks a model in
words instead, and reads a shared prompt once.

Left out: several labels for one text, weights for rare labels, and training on several machines.

Follows Radford et al. (2018, "Improving Language Understanding by Generative Pre-Training") for the head
on a language model, and Howard and Ruder (2018, "Universal Language Model Fine-tuning for Text
Classification") for learning rates by layer.

Explained and proven in ch06_classification/01_spam.ipynb; written from there by `make promote`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.checks import check_choice, require, whole_number
from shared.finetuning.features import POOLINGS, batches_by_length, pad_inputs, pool_states
from shared.generation.engine import evaluating
from shared.model.gpt import GPTModel
from shared.training.loop import Record, train
from shared.training.schedules import build_schedule


class GPTClassifier(nn.Module):
    """A GPT with a classification head in place of its output head.

    The head is one linear layer over one vector of each text, pooled from the states after the final norm. It begins
    with zeros: before any training all labels are equally probable.
    """

    def __init__(self, body: GPTModel, n_labels: int, pooling: str = "mean") -> None:
        super().__init__()
        require("n_labels", n_labels, whole_number("n_labels", n_labels) > 1, "at least 2")
        check_choice("pooling", pooling, POOLINGS)
        self.body, self.pooling = body, pooling
        self.head = nn.Linear(body.config.emb_dim, n_labels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Return logits (batch, n_labels) for `(tokens, mask)` of `pad_inputs`; states may stand for tokens."""
        tokens, mask = inputs
        options = {}
        if not bool(mask[:, 0].all()):
            # Padding on the left is what real tokens would see, and it would move their positions.
            options = {"key_padding_mask": mask, "positions": (mask.cumsum(1) - 1).clamp(min=0)}
        return self.head(pool_states(self.body.hidden_states(tokens, **options), mask, self.pooling))


PARTS = ("head", "last_block", "all")


def set_trainable(classifier: GPTClassifier, part: str) -> int:
    """Freeze everything but a part, "head", "last_block" (with the final norm and the head) or "all"; return its size.

    The size counts numbers that are trained. The output head, which a classifier does not use, is never among them
    unless it is tied to the token embedding and "all" is trained. Raises ValueError for another part.
    """
    check_choice("part", part, PARTS)
    body = classifier.body
    modules = {
        "head": [classifier.head],
        "last_block": [body.blocks[-1], body.final_norm, classifier.head],
        "all": [
            *(module for name, module in body.named_children() if name != "output_head"),
            classifier.head,
        ],
    }
    classifier.requires_grad_(False)
    for module in modules[part]:
        if module is not None:
            module.requires_grad_(True)
    return sum(parameter.numel() for parameter in classifier.parameters() if parameter.requires_grad)


def learning_rate_groups(
    classifier: GPTClassifier, learning_rate: float, head_learning_rate: float, decay: float = 1.0
) -> list[dict[str, object]]:
    """Return parameter groups for an optimizer: each block learns `decay` times as fast as the one above it.

    The last block and the final norm have `learning_rate`, the embeddings that of the first block times `decay`, the
    head its own. Frozen parameters are left out. Follows Howard and Ruder (2018, "Universal Language Model Fine-tuning
    for Text Classification"), who call it discriminative fine-tuning.

    Raises ValueError if a rate is not above 0, or `decay` not above 0 and at most 1.
    """
    for name, value in (("learning_rate", learning_rate), ("head_learning_rate", head_learning_rate)):
        require(name, value, 0 < value < math.inf, "above 0")
    require("decay", decay, 0 < decay <= 1, "above 0 and at most 1")
    body, groups, seen = classifier.body, [], set()
    layers = [(classifier.head, head_learning_rate), (body.final_norm, learning_rate)]
    for depth, block in enumerate(reversed(body.blocks)):
        layers.append((block, learning_rate * decay**depth))
    layers.append((body, learning_rate * decay ** len(body.blocks)))  # what is left: the embeddings
    for module, rate in layers:
        parameters = [p for p in module.parameters() if p.requires_grad and p not in seen]
        seen |= set(parameters)
        if parameters:
            groups.append({"params": parameters, "lr": rate})
    return groups


def label_batches(
    rows: Sequence[Sequence[int] | Tensor], targets: Sequence[int], batch_size: int, *, seed: int = 0
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Yield ((inputs, mask), targets) without end, in a new order in each epoch; rows of similar length together.

    Raises ValueError if there is no row, or the numbers of rows and targets differ.
    """
    require("rows", len(rows), len(rows) > 0, "at least one")
    require("targets", len(targets), len(targets) == len(rows), f"{len(rows)}, one for each row")
    whole_number("batch_size", batch_size)
    for epoch in count():
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(rows))
        # Sorted within pools of eight batches, so that an epoch's batches are random and have little padding.
        pools = [order[i : i + 8 * batch_size] for i in range(0, len(order), 8 * batch_size)]
        batches = []
        for pool in pools:
            pool = sorted(pool, key=lambda i: len(rows[i]))
            batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        for i in rng.permutation(len(batches)):
            yield pad_inputs([rows[j] for j in batches[i]]), torch.tensor([targets[j] for j in batches[i]])


def summed_label_loss(model: nn.Module, inputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    """Return the sum of -log p(label) in nats: the loss of `train` for a classifier."""
    return F.cross_entropy(model(inputs), targets, reduction="sum")


@torch.no_grad()
def label_logits(
    classifier: nn.Module, rows: Sequence[Sequence[int] | Tensor], batch_size: int = 32
) -> Tensor:
    """Return the logits (rows, n_labels) of rows of ids, or of states, in their order; without dropout."""
    device = next(classifier.parameters()).device
    logits = torch.empty(len(rows), classifier.head.out_features)
    with evaluating(classifier):
        for places in batches_by_length(rows, batch_size):
            inputs = tuple(part.to(device) for part in pad_inputs([rows[i] for i in places]))
            logits[places] = classifier(inputs).float().cpu()
    return logits


class _Enough(Exception):
    """No improvement for so long that training ends."""


def fine_tune(
    classifier: GPTClassifier,
    rows: Sequence[Sequence[int] | Tensor],
    targets: Sequence[int],
    validation: tuple[Sequence[Sequence[int] | Tensor], Sequence[int]],
    optimizer: torch.optim.Optimizer,
    *,
    n_epochs: int,
    batch_size: int = 16,
    patience: int = 2,
    seed: int = 0,
    n_warmup: int = 20,
    loss: Callable[[nn.Module, tuple[Tensor, Tensor], Tensor], Tensor] = summed_label_loss,
) -> list[Record]:
    """Train with early stopping: the weights with the lowest validation loss stay; return the log of `train`.

    The validation loss is measured after each epoch. After `patience` epochs without a better one training ends. The
    learning rates rise over `n_warmup` steps and then sink in a straight line to zero at the end of the last epoch.
    What is minimized is `loss`, of the classifier, inputs with mask, and targets, summed over the batch.

    Raises:
        ValueError: As `train` and `label_batches` do, a number is out of range, or the head has no such label.
    """
    for name, value in (("n_epochs", n_epochs), ("patience", patience), ("batch_size", batch_size)):
        whole_number(name, value)
    n_labels = classifier.head.out_features
    for name, labels in (("targets", targets), ("validation targets", validation[1])):
        wrong = sorted({int(label) for label in labels} - set(range(n_labels)))
        require(name, wrong, not wrong, f"labels from 0 to {n_labels - 1}, as the head has them")
    n_steps = n_epochs * math.ceil(len(rows) / batch_size)
    validation_targets = torch.as_tensor(validation[1])
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    best_loss, best, waited = math.inf, [], 0
    log: list[Record] = []

    def after_epoch(step: int) -> float:
        nonlocal best_loss, best, waited
        found = F.cross_entropy(label_logits(classifier, validation[0]), validation_targets).item()
        waited += 1
        if found < best_loss:
            best_loss, best, waited = found, [parameter.detach().clone() for parameter in trained], 0
        elif waited >= patience:
            raise _Enough
        return found

    with suppress(_Enough):
        train(
            classifier,
            label_batches(rows, targets, batch_size, seed=seed),
            optimizer,
            n_steps=n_steps,
            loss=loss,
            schedule=build_schedule("linear", n_steps, min(n_warmup, n_steps // 2)),
            evaluate_every=math.ceil(len(rows) / batch_size),
            on_evaluate=after_epoch,
            on_step=log.append,
        )
    with torch.no_grad():
        for parameter, value in zip(trained, best, strict=True):
            parameter.copy_(value)
    return log


@torch.no_grad()
def prompted_logits(
    model: GPTModel,
    prefix: Sequence[int],
    rows: Sequence[Sequence[int]],
    answers: Sequence[int],
    batch_size: int = 16,
) -> Tensor:
    """Return the logits (rows, answers) of each answer's token as the one that follows prefix + row.

    The prefix, such as a task with examples, is read once; its keys and values serve all rows.

    Raises:
        ValueError: A row is empty, or prefix and row are longer than the context.
    """
    require(
        "rows",
        min(map(len, rows), default=0),
        all(map(len, rows)) and len(rows) > 0,
        "rows of at least one token",
    )
    device = next(model.parameters()).device
    logits = torch.empty(len(rows), len(answers))
    with evaluating(model):
        # The prefix, once.
        stored = model.new_caches(max(1, len(prefix)))
        if prefix:
            model.hidden_states(torch.tensor([list(prefix)], device=device), caches=stored)
        for places in batches_by_length(rows, batch_size):
            tokens, mask = pad_inputs([rows[i] for i in places])
            # Its keys and values, for each row of the batch.
            caches = model.new_caches(len(prefix) + tokens.shape[1])
            for cache, one in zip(caches, stored, strict=True):
                if prefix:
                    cache.append(*(part.expand(len(places), -1, -1, -1) for part in one.contents()))
            hidden = model.hidden_states(tokens.to(device), caches=caches)
            last = pool_states(hidden, mask.to(device), "last")
            logits[places] = model.output_head(last)[:, list(answers)].float().cpu()
    return logits
