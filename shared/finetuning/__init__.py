"""From a language model to a tool for one task. In reading order:

- `features`: what a frozen model computes of texts, computed once and kept.
- `tuning`: a GPT with a classification head, trained in part or whole.
- `classification`: texts to labels with probabilities; the course's spam filter.
"""

from shared.finetuning.classification import load_classifier, read_labeled_texts, train_classifier
from shared.finetuning.features import cached_features
from shared.finetuning.tuning import GPTClassifier, fine_tune

__all__ = [
    "GPTClassifier",
    "cached_features",
    "fine_tune",
    "load_classifier",
    "read_labeled_texts",
    "train_classifier",
]
