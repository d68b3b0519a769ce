"""What a checkpoint of a run holds, gathered from all processes, and given back to each of them.

A checkpoint does not know how many processes wrote it: a sharded tensor is stored whole, and cut again for the
processes that read it.

Left out: the files and their order on the disk, which are `shared.training.checkpoint`'s.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from shared.pretraining.options import Options
from shared.pretraining.processes import shard_like, whole
from shared.pretraining.updates import rate_factors
from shared.training.checkpoint import Checkpoint, load_model_state, model_state

RATE_OPTIONS = ("steps", "schedule", "decay", "warmup_steps")  # on which the learning rates depend


def gather_model(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model, each of them whole. Every process must call it."""
    return {name: whole(tensor) for name, tensor in model_state(model).items()}


def gather_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer, each tensor of it whole. Every process must call it."""
    state = optimizer.state_dict()
    state["state"] = {
        index: {name: whole(value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return state


def scatter_model(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load whole weights into a model, of which this process may hold a part."""
    own = model_state(model)
    load_model_state(model, {name: shard_like(tensor, own.get(name)) for name, tensor in weights.items()})


def scatter_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a whole state into an optimizer, each tensor cut as the parameter is that it belongs to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        state["state"][index] = {name: shard_like(value, parameters[index]) for name, value in values.items()}
    optimizer.load_state_dict(state)


def check_same_run(path: Path, saved: Checkpoint, options: Options, data_sha256: str) -> None:
    """Raise ValueError if a checkpoint is of a run with other data, or other options that must not change.

    A run may become longer or shorter, or end with another decay, as long as the updates that it has made had the
    learning rates that they have now: so until the rate begins to fall.
    """
    if "options" not in saved.extra:
        raise ValueError(f"{path} was not written by pretrain.py: choose another --out")
    before, now = saved.extra["options"], asdict(options)
    fixed = [each.name for each in fields(Options) if not each.metadata["free"]]
    changed = {
        name: f"{name} {before.get(name)!r}, now {now[name]!r}"
        for name in fixed
        if before.get(name) != now[name]
    }
    if changed.keys() & set(RATE_OPTIONS):
        if now["steps"] < saved.step:
            changed["rates"] = f"{saved.step} steps are done"
        elif not _had_equal_rates(before, now, saved.step):
            changed["rates"] = f"the {saved.step} steps done would have had other learning rates"
        else:
            changed = {name: text for name, text in changed.items() if name not in RATE_OPTIONS}
    if saved.extra.get("data") != data_sha256:
        changed["data"] = changed.get("data", "other data")
    if changed:
        raise ValueError(f"{path} is of another run ({'; '.join(changed.values())}): choose another --out")


def _had_equal_rates(before: Mapping[str, Any], now: Mapping[str, Any], n_steps: int) -> bool:
    """Return whether the first updates have the same learning rates by both options."""
    factors = rate_factors(before), rate_factors(now)
    return all(factors[0](step) == factors[1](step) for step in range(n_steps))
