"""The losses of a language model, their units, and their measurement on whole texts.

Losses are in nats, the natural logarithm's unit; targets of `IGNORE` count for nothing. A mean is taken
over targets, once: means of means would weigh short batches too much.

Left out: losses other than that of the next token, each of which stands where it is explained.

Follows Radford et al. (2019, "Language Models are Unsupervised Multitask Learners") for the objective,
Shannon (1948, "A Mathematical Theory of Communication") for its unit.

Explained and proven in ch05_pretraining/01_training_loop.ipynb; written from there by `make promote`.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.training.batches import IGNORE, Batch, pad_rows


def next_token_loss(
    logits: Tensor, targets: Tensor, ignore_index: int = IGNORE, reduction: str = "mean"
) -> Tensor:
    """Return -log p(target) in nats.

    Args:
        logits: (batch, tokens, vocab_size); position t holds the prediction of targets[:, t].
        targets: int64 ids (batch, tokens).
        ignore_index: Targets of this value count for nothing.
        reduction: "mean" over the targets (NaN where there are none), "sum", or "none" for (batch, tokens) with zeros
            where ignored.

    Raises:
        ValueError: The shapes do not fit.
    """
    if logits.dim() != 3 or logits.shape[:2] != targets.shape:
        raise ValueError(
            f"logits must be (batch, tokens, vocab_size) with targets (batch, tokens), "
            f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()  # 8 or 11 bits are too few for a sum over the vocabulary
    # One row a target: with the vocabulary in the middle, (batch, vocab_size, tokens), torch is five times slower.
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction=reduction
    )
    return losses.view_as(targets) if reduction == "none" else losses


def perplexity(loss: float) -> float:
    """Return e to the mean loss in nats per token: the number of equally probable tokens that are as hard to guess.

    A loss that is too large for a floating-point number, above about 709.8 nats, gives infinity.
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Return the loss of a whole text, in nats, as bits for each of its UTF-8 bytes; ValueError if it has none."""
    if n_bytes < 1:
        raise ValueError(f"n_bytes must be at least 1, got {n_bytes}")
    return nats / math.log(2) / n_bytes


@contextmanager
def own_modes(model: nn.Module) -> Iterator[None]:
    """Give each module of `model` its own mode back at the end, training or evaluation, also after an error."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class Evaluation:
    """The loss of a model on a text: `loss` in nats per token, `nats` of all tokens together, number of `tokens`."""

    loss: float
    nats: float
    tokens: int


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], autocast: torch.dtype | None = None) -> Evaluation:
    """Return the loss of `model` on all `batches`, each target counted once.

    The model runs without dropout, and each of its modules is in its own mode afterwards. Raises ValueError if there is
    no target.
    """
    nats, n_tokens = 0.0, 0
    with own_modes(model):
        model.eval()
        for inputs, targets in on_device(batches, model):
            with precision(inputs.device, autocast):
                losses = next_token_loss(model(inputs), targets, reduction="none")
            nats += losses.cpu().double().sum().item()  # Apple's GPUs have no float64
            n_tokens += int((targets != IGNORE).sum())
    if not n_tokens:
        raise ValueError("batches hold no target to evaluate")
    return Evaluation(nats / n_tokens, nats, n_tokens)


def loss_per_document(model: nn.Module, rows: Sequence[Sequence[int]], batch_size: int = 32) -> float:
    """Return the mean over the rows of -log p(row), in nats per row, each read from its first token.

    For tales this is the loss whose lowest possible value is known: `shared.tales.generator.entropy()`.
    Raises ValueError if there is no row, or as `pad_rows` does.
    """
    ordered = sorted(rows, key=len)
    batches = (pad_rows(ordered[i : i + batch_size]) for i in range(0, len(ordered), batch_size))
    return evaluate(model, batches).nats / len(ordered)


def choose_device(name: str = "auto") -> torch.device:
    """Return a device of this machine by its name.

    "auto" is what the variable `LLM_DEVICE` names; where it names none, a GPU if there is one, else the CPU.

    Raises:
        ValueError: The name is not auto, cpu, mps, cuda or cuda:N, or this machine has no such device.
    """
    said_by = "device"
    if name == "auto":
        said_by, name = "LLM_DEVICE", os.environ.get("LLM_DEVICE") or "auto"
    n_devices = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(kind for kind, n in n_devices.items() if n))
    kind, colon, index = name.partition(":")
    if kind not in n_devices or (colon and not index.isdecimal()):
        raise ValueError(f"{said_by} must be auto, cpu, mps, cuda or cuda:N, got {name!r}")
    if int(index or 0) >= n_devices[kind]:
        found = ", ".join(f"{n} {kind}" for kind, n in n_devices.items())
        raise ValueError(f"{said_by} must be a device of this machine ({found}), got {name!r}")
    return torch.device(name)


def on_device(batches: Iterable[Batch], model: nn.Module) -> Iterator[Batch]:
    """Yield the batches on the device of the model's parameters; inputs may be a tensor, or a tuple or dict of some."""
    device = next(model.parameters()).device
    for inputs, targets in batches:
        yield _moved(inputs, device), targets.to(device)


def _moved(inputs: Tensor | Sequence | Mapping, device: torch.device) -> Tensor | tuple | dict:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: _moved(value, device) for name, value in inputs.items()}
    return tuple(_moved(value, device) for value in inputs)


def precision(device: torch.device, dtype: torch.dtype | None) -> torch.autocast | nullcontext:
    """Return the context in which a forward pass computes in `dtype` where that is safe; None changes nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
