"""A chat model on this machine as a judge: grades and preferences by the probability of the reply's first
token.

Its verdicts are always valid and seldom worth much: measure them, as the notebook does.

Left out: judges that write reasons before they grade, and calibration.

Explained and proven in ch07_instruction/02_evaluation.ipynb; written from there by `make promote`.
"""

from collections.abc import Sequence

from torch import Tensor

from shared.checks import check_text, require
from shared.finetuning.judge import Submission
from shared.finetuning.tuning import prompted_logits
from shared.model.gpt import GPTModel
from shared.text.chat_format import ChatFormat
from shared.text.tokenizer import BPETokenizer

GRADES = (1, 2, 3, 4, 5)
LOCAL_RUBRIC = (
    "You grade answers. 5: right and brief. 4: right, but too long. 2: wrong. "
    "1: has nothing to do with the question."
)


class LocalJudge:
    """A chat model on this machine that judges by the probability of its next token; it writes nothing.

    Args:
        model, tokenizer, chat_format: As in `shared.generation.conversation.Conversation`.
        rubric: What each grade means; the system message.

    Raises:
        ValueError: A grade or a letter is not a single token for this tokenizer.
    """

    def __init__(
        self,
        model: GPTModel,
        tokenizer: BPETokenizer,
        chat_format: ChatFormat,
        rubric: str = LOCAL_RUBRIC,
    ) -> None:
        check_text("rubric", rubric)
        self.model, self.tokenizer, self.chat_format = model, tokenizer, chat_format
        self._system = chat_format.encode_message(tokenizer, {"role": "system", "content": rubric})
        tokens = [tokenizer.encode_ordinary(text) for text in (*map(str, GRADES), "A", "B")]
        single = all(len(ids) == 1 for ids in tokens)
        require("tokenizer", tokens, single, "one with single tokens for 1 to 5, A and B")
        self._grades, self._letters = [ids[0] for ids in tokens[:5]], [ids[0] for ids in tokens[5:]]

    def _logits(self, texts: Sequence[str], answers: Sequence[int]) -> Tensor:
        """Return the logits (texts, answers) of the reply's first token; the system message is read once."""
        opening = self.chat_format.generation_prompt(self.tokenizer)
        rows = [
            self.chat_format.encode_message(self.tokenizer, {"role": "user", "content": text}) + opening
            for text in texts
        ]
        return prompted_logits(self.model, self._system, rows, answers)

    def grade_probabilities(self, submissions: Sequence[Submission]) -> Tensor:
        """Return the probability of each grade, 1 to 5, for each submission: (submissions, 5), rows that sum to 1.

        Raises ValueError if there is none, or one is longer than the model's context.
        """
        texts = [f"{_asked(one)}Answer: {one.answer}\n\nGrade, 1 to 5:" for one in submissions]
        return self._logits(texts, self._grades).softmax(dim=1)

    def grades(self, submissions: Sequence[Submission]) -> Tensor:
        """Return the expected grade of each submission, between 1 and 5. Errors as `grade_probabilities`."""
        probabilities = self.grade_probabilities(submissions)
        return probabilities @ probabilities.new_tensor(GRADES)

    def preferences(self, pairs: Sequence[tuple[Submission, Submission]]) -> Tensor:
        """Return log p(A) - log p(B) for each pair in the given and in the swapped order: (pairs, 2).

        A judge without position bias has the opposite number in the second column.
        Raises ValueError if a pair is not two answers to one question, there is none, or one is too long.
        """
        for first, second in pairs:
            same = (first.question, first.reference) == (second.question, second.reference)
            require("pairs", second.question, same, "two answers to one question, with one reference")
        texts = [
            f"{_asked(a)}Answer A: {a.answer}\nAnswer B: {b.answer}\n\nWhich answer is better, A or B?"
            for first, second in pairs
            for a, b in ((first, second), (second, first))
        ]
        logits = self._logits(texts, self._letters)
        return (logits[:, 0] - logits[:, 1]).view(-1, 2)


def _asked(submission: Submission) -> str:
    """Return how question and reference are put to a small model: in plain lines."""
    reference = f"Right answer: {submission.reference}\n" if submission.reference is not None else ""
    return f"Question: {submission.question}\n{reference}"
