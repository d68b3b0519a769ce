"""Texts to labels with probabilities: heads on frozen features, calibrated, with thresholds by cost, saved
and loaded.

`load_classifier("spam")` is the filter of chapter 6; `train_classifier` makes one from texts and labels
of your own. Saved is the head with the name of its base and the hash of the base's weights; a body that
was trained is saved whole.

Left out: texts longer than the model's context (they are cut, with a warning), several labels for one
text, and thresholds inside the classifier: choose one by `best_threshold`, for what mistakes cost you.

Follows Guo et al. (2017, "On Calibration of Modern Neural Networks") for the temperature.

Explained and proven in ch06_classification/01_spam.ipynb; written from there by `make promote`.
"""

import csv
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from shared.checks import check_choice, check_path, check_several, check_text, require
from shared.finetuning.features import POOLINGS, cached_features, lower_part, weights_hash
from shared.finetuning.tuning import GPTClassifier, label_logits
from shared.generation.streaming import Tokenizer
from shared.model.gpt import GPTConfig, GPTModel
from shared.weights.files import write_folder
from shared.weights.pretrained import CHECKPOINTS, load_pretrained, load_tokenizer


def encode_texts(
    encoding: Tokenizer, texts: Iterable[str], context_length: int
) -> tuple[list[list[int]], int]:
    """Return each text as a row of ids, cut to `context_length`, and how many had to be cut.

    Raises:
        ValueError: A text is empty or only white space; the message has its place.
        TypeError: `texts` is one text, or holds something else.
    """
    check_several("texts", texts)
    rows, n_cut = [], 0
    for place, text in enumerate(texts):
        check_text(f"texts[{place}]", text)
        require(f"texts[{place}]", text[:40], bool(text.strip()), "a text that is not empty")
        ids = encoding.encode_ordinary(text)
        n_cut += len(ids) > context_length
        rows.append(ids[:context_length])
    return rows, n_cut


def fit_head(
    features: Tensor, targets: Tensor, n_labels: int, *, penalty: float = 1e-2, max_steps: int = 200
) -> nn.Linear:
    """Return the linear layer that logistic regression finds: the best one, not one of many that training may reach.

    Features are standardized first, and the layer that is returned undoes it. What is minimized is convex: the mean of
    -log p(label) plus `penalty` / 2 times the sum of the squared weights (for standardized features, without the bias).
    That is scikit-learn's `LogisticRegression` with C = 1 / (penalty * n), or twice that for two labels, which share
    one row of weights there.

    Args:
        features: (n, emb_dim).
        targets: int64 (n,), labels from 0 to n_labels - 1, each at least once.

    Raises:
        ValueError: The shapes do not fit, a label never occurs, or `penalty` is not above 0.
    """
    if features.dim() != 2 or targets.shape != features.shape[:1]:
        raise ValueError(
            f"features must be (n, emb_dim) with targets (n,), got {tuple(features.shape)} and {tuple(targets.shape)}"
        )
    require("penalty", penalty, 0 < penalty < math.inf, "above 0")
    occur = torch.bincount(targets, minlength=n_labels)
    complete = len(occur) == n_labels and bool(occur.all())
    require("targets", occur.tolist(), complete, f"each of {n_labels} labels, at least once")
    # In float64, where the minimum is sharp.
    x = features.double()
    mean, scale = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x = (x - mean) / scale
    weight = torch.zeros(n_labels, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(n_labels, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_steps,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, targets) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    # As a layer for features as they are.
    head = nn.Linear(features.shape[1], n_labels)
    with torch.no_grad():
        plain = weight / scale
        head.weight.copy_(plain)
        head.bias.copy_(bias - plain @ mean)
    return head


def best_threshold(scores: Tensor, targets: Tensor, cost_missed: float, cost_false_alarm: float) -> float:
    """Return the threshold with the lowest cost: a text counts as positive if its score is at least the threshold.

    Args:
        scores: (n,), higher means more probably positive.
        targets: (n,), 1 for positive, 0 for negative.
        cost_missed: Of a positive text that is taken for negative.
        cost_false_alarm: Of a negative text that is taken for positive.

    Raises:
        ValueError: The shapes do not fit, or a cost is negative or both are zero.
    """
    if scores.dim() != 1 or scores.shape != targets.shape or not len(scores):
        raise ValueError(
            f"scores and targets must be (n,), got {tuple(scores.shape)} and {tuple(targets.shape)}"
        )
    costs = cost_missed, cost_false_alarm
    require("costs", costs, min(costs) >= 0 and sum(costs) > 0, "at least 0, and not both 0")
    # From the highest score downwards: what each place of the threshold costs, above all scores first.
    order = scores.argsort(descending=True)
    positive = targets[order].double()
    alarms = torch.cat([torch.zeros(1), (1 - positive).cumsum(0)])
    missed = positive.sum() - torch.cat([torch.zeros(1), positive.cumsum(0)])
    cost = cost_missed * missed + cost_false_alarm * alarms
    # Equal scores fall together: the threshold may stand only where the score changes.
    ordered = scores[order].double()
    allowed = torch.ones(len(cost), dtype=torch.bool)
    allowed[1:-1] = ordered[1:] != ordered[:-1]
    best = int(torch.where(allowed, cost, math.inf).argmin())
    # In the middle between two scores.
    if best == 0:
        return math.nextafter(ordered[0].item(), math.inf)
    if best == len(ordered):
        return ordered[-1].item()
    return (ordered[best - 1].item() + ordered[best].item()) / 2


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the number that logits are divided by so that -log p(label) is least: above 1 where a model was too sure.

    Use logits of texts that the head has not seen. Labels are softened a little, as if of n + n_labels texts n_labels
    had a random label: so a few texts that are all right do not make the model certain (as in Platt, 1999,
    "Probabilistic Outputs for Support Vector Machines"). Follows Guo et al. (2017, "On Calibration of Modern Neural
    Networks"). Raises ValueError if the shapes do not fit or there is no text.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or not len(targets):
        raise ValueError(
            f"logits must be (n, n_labels) with targets (n,), got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    n_labels = logits.shape[1]
    smoothing = n_labels / (len(targets) + n_labels)
    # One number to find, and the loss has one valley over the inverse temperature.
    low, high = -5.0, 5.0  # its logarithm
    for _ in range(60):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        losses = [
            F.cross_entropy(logits.double() * math.exp(-t), targets, label_smoothing=smoothing).item()
            for t in (left, right)
        ]
        low, high = (low, right) if losses[0] <= losses[1] else (left, high)
    return math.exp((low + high) / 2)


def _encode_and_say(encoding: Tokenizer, texts: Sequence[str], context_length: int) -> list[list[int]]:
    """Return the rows of `encode_texts`; a warning says how many texts were cut."""
    rows, n_cut = encode_texts(encoding, texts, context_length)
    if n_cut:
        warnings.warn(f"{n_cut} of {len(rows)} texts were cut to {context_length} tokens", stacklevel=3)
    return rows


@dataclass
class TextClassifier:
    """Texts in, labels and their probabilities out: a model, its tokenizer, a head and a temperature.

    Attributes:
        body: What reads the tokens; its states are pooled.
        encoding: The body's tokenizer.
        head: emb_dim -> labels.
        labels: The names of the labels, in the order of the head.
        pooling: How states become one vector.
        temperature: What logits are divided by, see `fit_temperature`.
        base: The name of the model that the body comes from, for `load_pretrained` and `load_tokenizer`.
        trained: Whether the body's weights were changed; then they are saved too.
    """

    body: GPTModel
    encoding: Tokenizer
    head: nn.Linear
    labels: tuple[str, ...]
    base: str
    pooling: str = "mean"
    temperature: float = 1.0
    trained: bool = False

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together (ValueError)."""
        wanted = (len(self.labels), self.body.config.emb_dim)
        if tuple(self.head.weight.shape) != wanted:
            raise ValueError(
                f"head must be (labels, emb_dim) = {wanted}, got {tuple(self.head.weight.shape)}"
            )
        check_choice("pooling", self.pooling, POOLINGS)
        require("temperature", self.temperature, 0 < self.temperature < math.inf, "above 0")

    def predict_proba(self, texts: Sequence[str], batch_size: int = 16) -> Tensor:
        """Return the probability of each label for each text: (texts, labels), rows that sum to 1.

        A text that is longer than the model's context is cut, with a warning that counts them. Raises ValueError if a
        text is empty, TypeError if `texts` is a single one.
        """
        rows = _encode_and_say(self.encoding, texts, self.body.config.context_length)
        if not rows:
            return torch.empty(0, len(self.labels))
        classifier = GPTClassifier(self.body, len(self.labels), self.pooling)
        classifier.head = self.head
        return (label_logits(classifier, rows, batch_size) / self.temperature).softmax(dim=1)

    def predict(self, texts: Sequence[str]) -> list[str]:
        """Return the most probable label of each text; see `predict_proba`."""
        return [self.labels[i] for i in self.predict_proba(texts).argmax(dim=1)]

    def save(self, folder: str | os.PathLike[str], *, replace: bool = False, **details: object) -> None:
        """Write a folder that `load_classifier` reads: the head, and the body's weights where they were trained.

        Args:
            folder: See `shared.weights.files.write_folder`, where the errors stand too.
            replace: Write in the place of an earlier classifier.
            details: How it came about, for the file classifier.json.
        """
        about = {
            "labels": list(self.labels),
            "pooling": self.pooling,
            "temperature": self.temperature,
            "base": self.base,
            "n_blocks": len(self.body.blocks),
            "body": asdict(self.body.config) if self.trained else weights_hash(self.body),
        }
        tensors = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        if self.trained:
            tensors |= {f"body.{name}": value.detach() for name, value in self.body.named_parameters()}
        write_folder(folder, {"classifier.json": about | details}, tensors, replace=replace)


def shipped_classifiers() -> list[str]:
    """Return the names of the classifiers that come with the course."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob("*/classifier.json"))


def load_classifier(name_or_path: str | os.PathLike[str]) -> TextClassifier:
    """Return a classifier from a name in `shipped_classifiers()`, or from a folder that `TextClassifier.save` wrote.

    Raises:
        ValueError: The name is unknown, the files do not fit together, or the base has other weights than the head was
            trained on.
        FileNotFoundError: The folder lacks a file.
        DownloadError: The base model is not on this machine and cannot be had.
    """
    known = shipped_classifiers()
    folder = CHECKPOINTS / name_or_path if name_or_path in known else Path(name_or_path)
    if not folder.is_dir():
        raise ValueError(
            f"name_or_path must be one of {', '.join(known)}, or a folder, got {os.fspath(name_or_path)!r}"
        )
    about = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
    try:
        base, n_blocks, trained = about["base"], about["n_blocks"], isinstance(about["body"], dict)
        temperature, pooling = about["temperature"], about["pooling"]
        tensors = load_file(folder / "model.safetensors")
        head = nn.Linear(tensors["head.weight"].shape[1], len(about["labels"]))
        head.load_state_dict({name: tensors.pop(f"head.{name}") for name in ("weight", "bias")})
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"{folder} holds no classifier of {about.get('labels')}: {error!r}") from error
    if trained:
        body = GPTModel(GPTConfig(**about["body"])).eval()
        if "body.final_norm.weight" not in tensors:
            body.final_norm = nn.Identity()
        weights = {name.removeprefix("body."): value for name, value in tensors.items()}
        body.load_state_dict(weights, strict=False)
    else:
        body = lower_part(load_pretrained(base, dtype=torch.float32), n_blocks)
        if weights_hash(body) != about["body"]:
            raise ValueError(f"{folder} was made for other weights of {base} than this machine has")
    return TextClassifier(
        body, load_tokenizer(base), head, tuple(about["labels"]), base, pooling, temperature, trained
    )


def check_labels(texts: Sequence[str], labels: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    """Return the kinds of labels in order, and each label as a number.

    Raises ValueError if the numbers of texts and labels differ, or a label is rare or the only one.
    """
    check_several("texts", texts)
    check_several("labels", labels)
    require("labels", len(labels), len(labels) == len(texts), f"{len(texts)}, one for each text")
    found = Counter(labels)
    require("labels", sorted(found), len(found) > 1, "of at least two kinds")
    rarest = min(found, key=found.get)
    require("labels", f"{found[rarest]} of {rarest!r}", found[rarest] >= 5, "at least 5 of each kind")
    names = tuple(sorted(found))
    return names, [names.index(label) for label in labels]


def train_classifier(
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    base: str = "smollm2-135m-instruct",
    n_blocks: int = 20,
    pooling: str = "mean",
    penalty: float = 0.03,
    seed: int = 0,
) -> TextClassifier:
    """Return a classifier for texts of your own: logistic regression on the features of a frozen model.

    The temperature is fitted to the logits of five heads, each for the fifth of the texts that it has not seen, drawn
    by `seed`; the head itself is then fitted to all texts.

    Args:
        texts: At least five for each label; longer ones than the model's context are cut, with a warning.
        labels: One for each text, of at least two kinds.
        base: A name for `load_pretrained`.
        n_blocks: How many of its blocks a text goes through.
        pooling: How the states of its tokens become one vector.
        penalty: See `fit_head`.

    Raises:
        ValueError: The numbers of texts and labels differ, a text is empty, or a label is rare or the only one.
    """
    names, numbers = check_labels(texts, labels)
    # What the frozen model makes of the texts, once.
    model, encoding = load_pretrained(base, dtype=torch.float32), load_tokenizer(base)
    rows = _encode_and_say(encoding, texts, model.config.context_length)
    features = cached_features(model, rows, n_blocks, pooling)
    targets = torch.tensor(numbers)
    # The temperature, from heads that have not seen what they judge: five times another fifth is left out.
    fifth = torch.zeros(len(rows), dtype=torch.int64)
    rng = np.random.default_rng(seed)
    for label in range(len(names)):
        places = torch.from_numpy(rng.permutation(np.flatnonzero(targets.numpy() == label)))
        fifth[places] = torch.arange(len(places)) % 5
    logits = torch.empty(len(rows), len(names))
    for k in range(5):
        part = fit_head(features[fifth != k], targets[fifth != k], len(names), penalty=penalty)
        logits[fifth == k] = part(features[fifth == k]).detach()
    temperature = fit_temperature(logits, targets)
    # The head, from all texts.
    head = fit_head(features, targets, len(names), penalty=penalty)
    body = lower_part(model, n_blocks)
    return TextClassifier(body, encoding, head, names, base, pooling, temperature)


def read_labeled_texts(
    path: str | os.PathLike[str], text: str = "text", label: str = "label"
) -> tuple[list[str], list[str]]:
    """Return the texts and labels of a CSV file with a header; of a TSV file if its name ends in .tsv.

    Rows whose text or label is empty are refused, by their line.

    Raises:
        ValueError: The file is no UTF-8 or no CSV, has no row or not these columns, or a row is incomplete.
        FileNotFoundError: There is no such file.
    """
    check_path("path", path)
    delimiter = "\t" if os.fspath(path).endswith(".tsv") else ","
    texts, labels = [], []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            columns = reader.fieldnames or []
            for name in (text, label):
                require("columns", columns, name in columns, f"with {name!r} among them")
            for row in reader:
                values = [(row[name] or "").strip() for name in (text, label)]
                if not all(values):
                    raise ValueError(f"{path}, line {reader.line_num}: text and label must not be empty")
                texts.append(values[0])
                labels.append(values[1])
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} must be a CSV file in UTF-8, got: {error}") from error
    require("path", os.fspath(path), bool(texts), "a file with at least one row below its header")
    return texts, labels
