"""Texts and labels to a classifier whose body is adapted by LoRA, saved as an adapter and a head.

`train_lora_classifier` makes one, `load_adapted_classifier` reads one; `fit_adapter` is the training for
somebody who brings rows or cached states.

Left out: the choice of rank and learning rate, and cross-validation; see appendix_lora/lora_runs.py and
appendix_lora/adapt_smollm2.py.

Follows chapter 6's `train_classifier` in what it takes and returns, and Kumar et al. (2022, "Fine-Tuning
can Distort Pretrained Features and Underperform Out-of-Distribution") for the head's start.

Explained and proven in appendix_lora/01_lora.ipynb; written from there by `make promote`.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shared.checks import require, whole_number
from shared.finetuning.classification import (
    TextClassifier,
    check_labels,
    encode_texts,
    fit_head,
    fit_temperature,
    load_classifier,
)
from shared.finetuning.features import (
    batches_by_length,
    lower_part,
    pad_inputs,
    pool_states,
    token_states,
    upper_part,
)
from shared.finetuning.lora import attach_lora, choose_targets, lora_groups, merge_lora, possible_targets
from shared.finetuning.lora_files import load_adapter, read_object, save_adapter
from shared.finetuning.tuning import GPTClassifier, fine_tune, label_logits
from shared.generation.streaming import Tokenizer
from shared.model.gpt import GPTModel
from shared.weights.pretrained import CHECKPOINTS, load_pretrained, load_tokenizer


@torch.no_grad()
def pooled_states(body: GPTModel, inputs: Sequence[Sequence[int] | Tensor], pooling: str = "mean") -> Tensor:
    """Return one vector for each row of ids, or of states of a lower part, as `GPTClassifier` pools them."""
    device, found = next(body.parameters()).device, torch.empty(len(inputs), body.config.emb_dim)
    for places in batches_by_length(inputs, 16):
        tokens, mask = (part.to(device) for part in pad_inputs([inputs[i] for i in places]))
        found[places] = pool_states(body.hidden_states(tokens), mask, pooling).float().cpu()
    return found


def fit_adapter(
    body: GPTModel,
    learned: tuple[Sequence, Sequence[int]],
    watched: tuple[Sequence, Sequence[int]],
    n_labels: int,
    *,
    learning_rate: float,
    head_learning_rate: float = 1e-3,
    n_epochs: int,
    pooling: str = "mean",
    head: nn.Linear | None = None,
    seed: int = 0,
) -> GPTClassifier:
    """Train a body's adapter and a new head together; the weights that are best on the watched rows stay.

    Without a `head` to begin with it is the logistic regression of the learned rows, so nothing is spoilt for it while
    the adapter still computes nothing (Kumar et al., 2022).

    Args:
        body: With an adapter that is to be trained; an upper part, if the rows are states that leave a lower one.
        learned, watched: Rows of ids or of states, and their labels as numbers.
        learning_rate, head_learning_rate: Of the adapter and of the head, at their peak.

    Raises:
        ValueError: As `fit_head` and `fine_tune`.
    """
    classifier = GPTClassifier(body, n_labels, pooling)
    if head is None:
        features = pooled_states(body.eval(), learned[0], pooling)
        head = fit_head(features, torch.as_tensor(learned[1]), n_labels, penalty=0.03)
    classifier.head = head.to(next(body.parameters()).device)
    groups = lora_groups(classifier, learning_rate, other_learning_rate=head_learning_rate)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    fine_tune(classifier, *learned, watched, optimizer, n_epochs=n_epochs, patience=3, seed=seed)
    return classifier


def head_of_words(model: GPTModel, encoding: Tokenizer, labels: Sequence[str]) -> nn.Linear:
    """Return a head whose rows are those of the model's output head for the first token of each label's word.

    Raises ValueError if two labels begin with the same token.
    """
    first = [encoding.encode_ordinary(f" {label}")[0] for label in labels]
    require("labels", list(labels), len(set(first)) == len(first), "labels that begin with different tokens")
    head = nn.utils.skip_init(nn.Linear, model.config.emb_dim, len(labels))
    with torch.no_grad():
        head.weight.copy_(model.output_head.weight[first])
        head.bias.zero_()
    return head


def upper_targets(model: nn.Module, targets: str | Sequence[str], n_frozen: int) -> tuple[str, ...]:
    """Return the names of those targets that lie above the first `n_frozen` blocks; see `attach_lora` for targets.

    Raises ValueError if the targets fit nothing, or nothing above these blocks.
    """
    asked = (targets,) if isinstance(targets, str) else tuple(targets)
    if not n_frozen:
        return asked
    chosen = choose_targets(model, asked)
    names = tuple(
        name
        for name, target in possible_targets(model).items()
        if target in chosen and name.startswith("blocks.") and int(name.split(".")[1]) >= n_frozen
    )
    require("n_frozen", n_frozen, bool(names), f"below the blocks of {', '.join(asked)}")
    return names


def prompted_rows(
    encoding: Tokenizer, texts: Sequence[str], prompt: tuple[str, str], context_length: int
) -> list[list[int]]:
    """Return each text as a row of ids between the two parts of a prompt; too long a text is cut, with a warning.

    Raises ValueError as `encode_texts`, and if the prompt leaves no room for a text.
    """
    before, behind = (encoding.encode_ordinary(part) for part in prompt)
    room = context_length - len(before) - len(behind)
    require("prompt", prompt, room > 0, f"shorter than {context_length} tokens")
    rows, n_cut = encode_texts(encoding, texts, room)
    if n_cut:
        warnings.warn(f"{n_cut} of {len(rows)} texts were cut to {room} tokens", stacklevel=3)
    return [[*before, *row, *behind] for row in rows]


@dataclass
class AdaptedClassifier(TextClassifier):
    """A classifier whose body has an adapter. It is saved without the body, which anybody has by its name.

    `prompt` is what is written before and behind a text, see `train_lora_classifier`.
    """

    prompt: tuple[str, str] = ("", "")

    def predict_proba(self, texts: Sequence[str], batch_size: int = 16) -> Tensor:
        """As `TextClassifier.predict_proba`, with the prompt around each text."""
        rows = prompted_rows(self.encoding, texts, self.prompt, self.body.config.context_length)
        if not rows:
            return torch.empty(0, len(self.labels))
        classifier = GPTClassifier(self.body, len(self.labels), self.pooling)
        classifier.head = self.head
        return (label_logits(classifier, rows, batch_size) / self.temperature).softmax(dim=1)

    def save(self, folder: str | os.PathLike[str], *, replace: bool = False, **details: object) -> None:
        """Write a folder that `load_adapted_classifier` reads: the adapter, the head and what belongs to them.

        See `save_adapter` for the arguments, `dtype` among the details.
        """
        is_lower = isinstance(self.body.final_norm, nn.Identity)
        about = {
            "labels": list(self.labels),
            "prompt": list(self.prompt),
            "pooling": self.pooling,
            "temperature": self.temperature,
            "n_blocks": len(self.body.blocks) if is_lower else None,
        }
        save_adapter(
            self.body,
            folder,
            base=self.base,
            extra=self.head.state_dict(),
            replace=replace,
            **about,
            **details,
        )


def shipped_adapters() -> list[str]:
    """Return the names of the adapted classifiers that come with the course."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob("*/adapter.json"))


def load_adapted_classifier(name_or_path: str | os.PathLike[str]) -> AdaptedClassifier:
    """Return a classifier from a name in `shipped_adapters()`, or from a folder that `AdaptedClassifier.save` wrote.

    The adapter is merged beside the base, so that it costs no time. To train on, call `unmerge_lora(classifier.body)`.

    Raises:
        ValueError: The name is unknown, the files are damaged or do not fit together, or the base has other weights.
        FileNotFoundError: The folder lacks a file.
        DownloadError: The base model is not on this machine and cannot be had.
    """
    known = shipped_adapters()
    folder = CHECKPOINTS / name_or_path if name_or_path in known else Path(name_or_path)
    if not folder.is_dir():
        allowed = f"one of {', '.join(known) or 'none'}, or a folder"
        raise ValueError(f"name_or_path must be {allowed}, got {os.fspath(name_or_path)!r}")
    about = read_object(folder / "adapter.json")
    try:
        labels, n_blocks, base = tuple(about["labels"]), about["n_blocks"], about["base"]
        pooling, temperature = about["pooling"], about["temperature"]
        before, behind = about["prompt"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} holds an adapter, but no classifier: {error!r}") from None
    body = load_pretrained(base, dtype=torch.float32)
    body = body if n_blocks is None else lower_part(body, n_blocks)
    _, tensors = load_adapter(body, folder)
    try:
        head = nn.Linear(body.config.emb_dim, len(labels))
        head.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{folder} holds no head for {labels}: {error}") from error
    merge_lora(body.requires_grad_(False))
    return AdaptedClassifier(
        body.eval(),
        load_tokenizer(base),
        head,
        labels,
        base,
        pooling,
        temperature,
        trained=True,
        prompt=(before, behind),
    )


def open_classifier(name_or_path: str | os.PathLike[str]) -> TextClassifier:
    """Return a classifier of either kind, from a name or a folder: see `load_classifier`, `load_adapted_classifier`.

    Raises ValueError if the name is unknown and there is no such folder; other errors stand there.
    """
    if name_or_path in shipped_adapters() or (Path(name_or_path) / "adapter.json").is_file():
        return load_adapted_classifier(name_or_path)
    return load_classifier(name_or_path)


def above_frozen(
    body: GPTModel, rows: Sequence[Sequence[int]], n_frozen: int
) -> tuple[list[Sequence[int] | Tensor], GPTModel]:
    """Return what the first blocks make of each row, computed once, and the part of the body above them."""
    inputs: list[Sequence[int] | Tensor] = list(rows)
    if not n_frozen:
        return inputs, body
    for i, states in token_states(body, rows, n_frozen):
        inputs[i] = states
    return inputs, upper_part(body, n_frozen)


def watched_fifth(numbers: Sequence[int], seed: int) -> set[int]:
    """Return the places of a fifth of the rows of each label, drawn by `seed`."""
    rng, found = np.random.default_rng(seed), set()
    for label in range(max(numbers) + 1):
        places = rng.permutation(np.flatnonzero(np.array(numbers) == label))
        found |= set(places[: len(places) // 5].tolist())
    return found


def train_lora_classifier(
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    base: str = "tales-3m",
    prompt: tuple[str, str] | None = None,
    n_blocks: int | None = None,
    n_frozen: int = 0,
    rank: int = 8,
    targets: str | Sequence[str] = "all-linear",
    learning_rate: float = 1e-3,
    head_learning_rate: float = 1e-3,
    n_epochs: int = 10,
    watched: tuple[Sequence[str], Sequence[str]] | None = None,
    seed: int = 0,
) -> AdaptedClassifier:
    """Return a classifier for texts of your own: a base model adapted to them by LoRA, merged beside the base.

    Args:
        texts: At least five for each label; longer ones than the model's context are cut, with a warning.
        labels: One for each text, of at least two kinds.
        base: A name for `load_pretrained`.
        prompt: What is written before and behind each text, so that the label's word is what comes next. The head then
            begins as the model's own rows for these words. None: nothing is written, and the head begins as logistic
            regression on the mean of the states.
        n_blocks: How many of its blocks a text goes through; None: all, and the final norm. A prompt needs all.
        n_frozen: Blocks without an adapter; a text goes through them once, not in each epoch.
        rank, targets: See `attach_lora`.
        learning_rate, head_learning_rate: Of the adapter and of the head, at their peak.
        n_epochs: Most passes over the texts; training ends earlier if the watched ones do not improve.
        watched: Texts and their labels that are not learned from: they decide when training ends, and fit the
            temperature. None: a fifth of the texts of each label, drawn by `seed`.

    Raises:
        ValueError: The numbers of texts and labels differ, a text is empty, a label is rare or the only one, or watched
            and not learned, two labels begin with the same token where there is a prompt, or a number is out of range.
    """
    names, numbers = check_labels(texts, labels)
    more, more_labels = watched or ((), ())
    fits = len(more) == len(more_labels) >= (watched is not None) and set(more_labels) <= set(names)
    require(
        "watched", list(more_labels)[:5], fits, "None, or texts and as many labels, of those that are learned"
    )
    numbers = [*numbers, *map(names.index, more_labels)]
    n_frozen, rank = whole_number("n_frozen", n_frozen, 0), whole_number("rank", rank)
    require("n_blocks", n_blocks, prompt is None or n_blocks is None, "None where there is a prompt")
    body, encoding = load_pretrained(base, dtype=torch.float32), load_tokenizer(base)
    rows = prompted_rows(encoding, [*texts, *more], prompt or ("", ""), body.config.context_length)
    head = None if prompt is None else head_of_words(body, encoding, names)
    body = body if n_blocks is None else lower_part(body, n_blocks)
    wanted = upper_targets(body, targets, n_frozen)
    inputs, upper = above_frozen(body, rows, n_frozen)
    aside = watched_fifth(numbers, seed) if watched is None else set(range(len(texts), len(rows)))
    pick = lambda places: ([inputs[i] for i in places], [numbers[i] for i in places])
    held, learned = pick(sorted(aside)), pick([i for i in range(len(rows)) if i not in aside])
    # The adapter and a head, trained together.
    rates = {"learning_rate": learning_rate, "head_learning_rate": head_learning_rate}
    options = {**rates, "n_epochs": n_epochs, "seed": seed, "head": head}
    pooling = "mean" if prompt is None else "last"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attach_lora(body, wanted, rank=rank, alpha=float(rank))
        classifier = fit_adapter(upper, learned, held, len(names), pooling=pooling, **options)
    temperature = fit_temperature(label_logits(classifier, held[0]), torch.tensor(held[1]))
    merge_lora(body.requires_grad_(False))
    found = (body.eval(), encoding, classifier.head, names, base, pooling, temperature)
    return AdaptedClassifier(*found, trained=True, prompt=prompt or ("", ""))
