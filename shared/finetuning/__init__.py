"""From a language model to a tool for one task. In reading order:

- `features`: what a frozen model computes of texts, computed once and kept.
- `tuning`: a GPT with a classification head, trained in part or whole.
- `augmentation`: other texts with the same label.
- `adversarial`: attacks on texts by their spelling, and training against the worst shift of embeddings.
- `encoders`: a BERT with a classification head.
- `embeddings`: texts to vectors whose direction is their meaning.
- `contrastive`: pairs that shall find each other: cosines, their factor, the loss in both directions.
- `clip`: CLIP, an image encoder and a text encoder that meet in one space.
- `classification`: texts to labels with probabilities; the course's spam filter.
- `conversations`: what to learn from: checked, read from JSONL, compared with the test set.
- `instruction`: from continuing a text to answering: new tokens, labels, batches, tuning, replies.
- `packing`: several conversations in one row that do not see each other.
- `differences`: a tuned model as its difference to the model it comes from.
- `evaluation`: answers against references, and the agreement of two measures.
- `likelihood`: how probable an answer is for a model; multiple choice.
- `judge_replies`: what comes back from a judge over HTTP, and a cache of it.
- `judge_client`: how a judge is asked, with limits, tries and waits.
- `judge`: a language model as a judge: rubric, schema, strict parser, pairs in both orders.
- `local_judge`: a chat model on this machine that judges by the probability of its next token.
- `spans`: pieces of a text as characters and as tokens, windows over long texts.
- `question_answering`: answers that are spans of a text, or silence.
- `retrieval`: search in texts, by words and by meaning.
- `lora_layer`: a linear map with low-rank adapters beside it: LoRA, rsLoRA, DoRA.
- `lora`: adapters in a model, attached by one call and taken off without a trace.
- `packed_base`: a frozen base whose weights stay in the blocks of a GGUF file.
- `lora_files`: adapters in folders, in our format and in PEFT's.
- `lora_classifier`: texts and labels to a classifier, saved as an adapter and a head.
"""

from shared.finetuning.classification import load_classifier, read_labeled_texts, train_classifier
from shared.finetuning.differences import load_difference
from shared.finetuning.evaluation import score_answers
from shared.finetuning.features import cached_features
from shared.finetuning.tuning import GPTClassifier, fine_tune

__all__ = [
    "GPTClassifier",
    "cached_features",
    "fine_tune",
    "load_classifier",
    "load_difference",
    "read_labeled_texts",
    "score_answers",
    "train_classifier",
]
