"""Training on one machine. In reading order:

- `loop`: documents to batches, the loss and its units, evaluation, the loop and its log.
- `schedules`: the learning rate over the steps.
- `optimizers`: Muon and Lion, and the groups of parameters for every optimizer.
- `planning`: parameters, memory, arithmetic and traffic of a run before it begins.
- `checkpoint`: a run saved and continued to the last digit.
- `diagnosis`: first-aid checks of a run, early stopping, a profile by operator.
"""

from shared.training.checkpoint import load_checkpoint, save_checkpoint
from shared.training.diagnosis import diagnose
from shared.training.loop import evaluate, next_token_loss, train
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
