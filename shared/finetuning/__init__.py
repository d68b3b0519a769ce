"""From a language model to a tool for one task. In reading order:

- `features`: what a frozen model computes of texts, computed once and kept.
- `tuning`: a GPT with a classification head, trained in part or whole.
- `classification`: texts to labels with probabilities; the course's spam filter.
- `conversations`: what to learn from: checked, read from JSONL, compared with the test set.
- `instruction`: from continuing a text to answering: new tokens, labels, batches, tuning, replies.
- `packing`: several conversations in one row that do not see each other.
- `differences`: a tuned model as its difference to the model it comes from.
"""

from shared.finetuning.classification import load_classifier, read_labeled_texts, train_classifier
from shared.finetuning.differences import load_difference
from shared.finetuning.features import cached_features
from shared.finetuning.tuning import GPTClassifier, fine_tune

__all__ = [
    "GPTClassifier",
    "cached_features",
    "fine_tune",
    "load_classifier",
    "load_difference",
    "read_labeled_texts",
    "train_classifier",
]
