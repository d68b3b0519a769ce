"""How a training run of `ch05_pretraining/pretrain.py` is judged: the losses of its model on held-out rows.

Every process reads its share of the rows, and the sums of all are put together.
"""

import math

import tiktoken
import torch
from torch import Tensor, nn

from shared.pretraining.options import Options
from shared.pretraining.processes import Processes
from shared.pretraining.rows import DocumentRows, Usage, WindowRows, counted
from shared.training.losses import bits_per_byte, next_token_loss, own_modes


def token_byte_lengths(encoding: tiktoken.Encoding, vocab_size: int) -> Tensor:
    """Return how many bytes of text each token stands for, int64 (vocab_size,); special tokens stand for none."""
    lengths = [0] * vocab_size
    for token in encoding.token_byte_values():
        lengths[encoding.encode_single_token(token)] = len(token)
    return torch.tensor(lengths)


class HeldOut:
    """The validation rows of a run, and what a model's losses on them are called.

    Args:
        options: Of the run.
        rows: The held-out rows.
        token_bytes: Bytes that each token stands for, int64 (vocab_size,).
        floor: The lowest possible loss in nats per document, where it is known; all rows are read then.
    """

    def __init__(
        self,
        options: Options,
        rows: DocumentRows | WindowRows,
        token_bytes: Tensor,
        floor: float | None,
    ) -> None:
        self.rows, self.token_bytes, self.floor = rows, token_bytes, floor
        self.batch_size = max(1, options.batch_size // options.accumulation)
        n_chosen = len(rows) if floor else min(len(rows), options.evaluation_rows)
        self.chosen = [i * len(rows) // n_chosen for i in range(n_chosen)]  # from all files alike
        if isinstance(rows, DocumentRows):
            lengths = rows.lengths
            self.chosen.sort(key=lambda row: int(lengths[row]))  # rows of like length need little padding
        # The beginnings of documents are not documents.
        self.documents_are_whole = (
            isinstance(rows, DocumentRows) and rows.lengths[self.chosen].max() <= rows.context_length
        )

    def usage(self) -> Usage:
        """Return how many of the held-out tokens the model is judged by."""
        whole = self.rows.usage()
        n_others = len(self.rows) - len(self.chosen)
        others = whole.used - self.rows.n_targets(self.chosen)
        lost = {f"in {counted(n_others, 'row')} above evaluation_rows": others} if others else {}
        return Usage(whole.rows, whole.tokens, {**whole.lost, **lost})

    @torch.no_grad()
    def losses(self, model: nn.Module, processes: Processes) -> dict[str, float]:
        """Return a model's losses: nats per token, bits per byte, nats per document, percent above the floor.

        The last two are left out where rows are no whole documents, and where there is no floor. Nothing is rounded to
        bf16 here. Every module of the model keeps its own mode.
        """
        # Sums over the rows of this process, on the CPU: not every device has float64.
        sums = torch.zeros(3, dtype=torch.float64)  # nats, targets, bytes
        with own_modes(model):
            model.eval()
            for start in range(0, len(self.chosen), self.batch_size):
                part = self.chosen[start : start + self.batch_size]
                own = part[processes.rank :: processes.world_size]
                # A sharded model needs every process in every pass, also one that has no row left.
                inputs, targets = self.rows.tensors(own or part[:1])
                logits = model(inputs.to(processes.device))
                losses = next_token_loss(logits, targets.to(processes.device), reduction="none").cpu()
                counted = targets >= 0
                n_bytes = (self.token_bytes[targets.clamp(min=0)] * counted).sum()
                if own:
                    sums += torch.stack([losses.double().sum(), counted.sum().double(), n_bytes.double()])

        # The sums of all processes in the units that people compare.
        nats, n_targets, n_bytes = processes.total(sums).tolist()
        # A very short text may end with its end token, which stands for no byte.
        result = {
            "loss": nats / n_targets,
            "bits_per_byte": bits_per_byte(nats, round(n_bytes)) if n_bytes else math.nan,
        }
        if self.documents_are_whole:
            result["loss_per_document"] = nats / len(self.chosen)
        if self.floor:
            result["percent_above_floor"] = 100 * (result["loss_per_document"] / self.floor - 1)
        return result
