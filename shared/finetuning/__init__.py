"""From a language model to a tool for one task. In reading order:

- `features`: what a frozen model computes of texts, computed once and kept.
- `tuning`: a GPT with a classification head, trained in part or whole.
- `classification`: texts to labels with probabilities; the course's spam filter.
- `evaluation`: answers against references, and the agreement of two measures.
- `likelihood`: how probable an answer is for a model; multiple choice.
- `judge_replies`: what comes back from a judge over HTTP, and a cache of it.
- `judge_client`: how a judge is asked, with limits, tries and waits.
- `judge`: a language model as a judge: rubric, schema, strict parser, pairs in both orders.
- `local_judge`: a chat model on this machine that judges by the probability of its next token.
"""

from shared.finetuning.classification import load_classifier, read_labeled_texts, train_classifier
from shared.finetuning.evaluation import score_answers
from shared.finetuning.features import cached_features
from shared.finetuning.tuning import GPTClassifier, fine_tune

__all__ = [
    "GPTClassifier",
    "cached_features",
    "fine_tune",
    "load_classifier",
    "read_labeled_texts",
    "score_answers",
    "train_classifier",
]
