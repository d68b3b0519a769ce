"""What a training run of `ch05_pretraining/pretrain.py` minimizes: the loss of its targets, and what options add.

Added may be: weight on the probability that the model leaves to tokens that cannot come, weight on rare tokens that
are repeated, and the loss that keeps all experts busy. None of them is part of the loss that is logged.
"""

import tiktoken
import torch
from torch import Tensor

from shared.model.gpt import GPTModel
from shared.model.layers import balance_loss
from shared.pretraining.options import Options
from shared.pretraining.rows import DocumentRows, WindowRows, repeated_targets
from shared.tales.distribution import expected_loss, next_tokens
from shared.training.losses import next_token_loss


class Objective:
    """The losses of a part of a batch.

    Args:
        options: Of the run.
        encoding: Its tokenizer.
        train_rows: Its training rows, in which tokens are counted where the options ask for rare ones.
        vocab_size: Of the model.
        device: Where the model computes.
    """

    def __init__(
        self,
        options: Options,
        encoding: tiktoken.Encoding,
        train_rows: DocumentRows | WindowRows,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.options, self.encoding = options, encoding
        self.rare: Tensor | None = None  # bool (vocab_size,)
        if options.repeat_weight and isinstance(train_rows, DocumentRows):
            shares = train_rows.token_shares(vocab_size)
            self.rare = (shares <= options.repeat_share).to(device)

    def losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each target in nats, and the share of it that tokens outside of the grammar cause.

        Args:
            logits: (rows, tokens, vocab_size).
            targets: int64 (rows, tokens), those of padding negative.
        """
        if not self.options.exact_targets:
            losses = next_token_loss(logits, targets, reduction="none")
            return losses, torch.zeros_like(losses)
        stories = [self.encoding.decode(row[row >= 0][:-1].tolist()) for row in targets]
        return expected_loss(logits, map(next_tokens, stories))

    def total(
        self,
        losses: Tensor,
        outside: Tensor,
        batch: tuple[Tensor, Tensor],
        step: int,
        model: GPTModel,
        n_parts: int,
    ) -> Tensor:
        """Return the number that a part of a batch minimizes.

        Args:
            losses, outside: Of `losses`, (rows, tokens), each divided by the number of targets of the whole batch.
            batch: (inputs, targets) of the part.
            step: Steps done before this one.
            model: Its last forward pass was over this part.
            n_parts: Parts of the whole batch, in all processes together.
        """
        options = self.options
        total = losses.sum()
        if options.outside_weight:
            total = total + options.outside_weight * outside.sum()
        if self.rare is not None and options.repeat_from <= step < options.repeat_until:
            repeated = repeated_targets(*batch, self.rare)
            total = total + options.repeat_weight * losses[repeated].sum()
        if model.config.feed_forward == "moe" and options.balance_weight:
            total = total + options.balance_weight / n_parts * balance_loss(model)
        return total
