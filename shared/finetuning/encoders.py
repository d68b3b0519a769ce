"""A BERT with a classification head, for `shared.finetuning.tuning.fine_tune`.

Left out: pairs of texts (all tokens are of the first segment), and one label for each token.

Follows Devlin et al. (2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding").

Explained and proven in appendix_vit_bert/01_bert.ipynb; written from there by `make promote`.
"""

from torch import Tensor, nn

from shared.checks import check_choice, require, whole_number
from shared.finetuning.features import pool_states
from shared.model.bert import BERTModel

ENCODER_POOLINGS = ("pooler", "first", "mean")


class BERTClassifier(nn.Module):
    """A BERT with a classification head: for `fine_tune`, like `GPTClassifier`.

    Args:
        body: The encoder.
        n_labels: Number of labels.
        pooling: How an input becomes one vector: "pooler", BERT's own layer over [CLS]; "first", the vector of [CLS];
            or "mean", over all real tokens.

    Raises:
        ValueError: `n_labels` is below 2, or the pooling unknown.
    """

    def __init__(self, body: BERTModel, n_labels: int, pooling: str = "pooler") -> None:
        super().__init__()
        require("n_labels", n_labels, whole_number("n_labels", n_labels) > 1, "at least 2")
        check_choice("pooling", pooling, ENCODER_POOLINGS)
        self.body, self.pooling = body, pooling
        self.head = nn.Linear(body.config.emb_dim, n_labels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Return logits (batch, n_labels) for `(tokens, mask)` of `pad_inputs`; rows begin with [CLS]."""
        tokens, mask = inputs
        # Unlike in a GPT, every token would see the padding: the mask is always needed.
        hidden = self.body(tokens, mask=mask)
        if self.pooling == "pooler":
            return self.head(self.body.pool(hidden))
        return self.head(pool_states(hidden, mask, self.pooling))
