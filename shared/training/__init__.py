"""Training on one machine. In reading order:

- `batches`: documents to rows of ids, rows to padded batches.
- `losses`: the loss of the next token, its units, evaluation, the choice of a device.
- `loop`: the training loop, for any loss, and its log.
- `schedules`: the learning rate over the steps.
- `optimizers`: Muon and Lion, and the groups of parameters for every optimizer.
- `masking`: BERT's exercises: hidden tokens, and pairs of which the second follows or not.
- `planning`: parameters, memory, arithmetic and traffic of a run before it begins.
- `checkpoint`: a run saved and continued to the last digit.
- `diagnosis`: first-aid checks of a run, early stopping, a profile by operator.
"""

from shared.training.checkpoint import load_checkpoint, save_checkpoint
from shared.training.diagnosis import diagnose
from shared.training.loop import train
from shared.training.losses import evaluate, next_token_loss
from shared.training.optimizers import build_optimizers
from shared.training.schedules import build_schedule

__all__ = [
    "build_optimizers",
    "build_schedule",
    "diagnose",
    "evaluate",
    "load_checkpoint",
    "next_token_loss",
    "save_checkpoint",
    "train",
]
