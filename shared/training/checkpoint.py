"""Checkpoints that survive a crash: written whole or not at all, read back to the last bit.

A checkpoint is a folder `step-00001000` with `model.safetensors`, `optimizer.safetensors`,
`random.safetensors` and `state.json`: numbers and JSON, never pickles, which can run code when they are
read. It is written under another name, brought to the disk with fsync and then renamed, so that a killed
process or a full disk leaves the earlier ones as they were. SHA-256 sums in `state.json` show damage when
it is read.

Left out: writing in the background, each process writing its own part (a sharded model is gathered
first), and two processes that write into the same folder at once.

Follows the usual order write, fsync, rename, fsync of the folder (Pillai et al., 2014, "All File Systems
Are Not Created Equal").

Explained and proven in ch05_pretraining/05_many_machines.ipynb; written from there by `make promote`.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and saved buffers by name, each tensor once: a tied output head is left out."""
    kept, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor.detach()
    return kept


def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state of `model_state` into a model of the same shape.

    Raises:
        ValueError: A name is missing or unknown, or a shape differs.
    """
    own = model_state(model)
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is unknown" for name in state if name not in own]
    wrong += [
        f"{name} has shape {tuple(state[name].shape)}, the model's is {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"the state does not fit the model: {'; '.join(wrong[:5])}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def random_states() -> dict[str, Tensor]:
    """Return the states of torch's random generators, uint8: of the CPU and, where there is one, the CUDA device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Set the generators to states of `random_states`; one that this machine lacks is left out."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def split_optimizer_state(state: Mapping) -> tuple[dict[str, Tensor], dict]:
    """Split an optimiser's `state_dict()` into (tensors by name "parameter/key", everything else)."""
    tensors, plain = {}, {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{key}"] = value
            else:
                plain[f"{index}/{key}"] = value
    return tensors, {"values": plain, "param_groups": state["param_groups"]}


def join_optimizer_state(tensors: Mapping[str, Tensor], rest: Mapping) -> dict:
    """Return the `state_dict()` that `split_optimizer_state` split; tuples come back as lists."""
    state: dict[int, dict] = {}
    for name, value in {**tensors, **rest["values"]}.items():
        index, key = name.split("/", 1)
        state.setdefault(int(index), {})[key] = value
    return {"state": dict(sorted(state.items())), "param_groups": rest["param_groups"]}


STATE_FILE = "state.json"


class CheckpointError(OSError):
    """A checkpoint cannot be written or read; the message names the folder and the reason."""


@dataclass
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        step: Steps done.
        model: Tensors by name, as `model_state` returns them.
        optimizers: A `state_dict()` of each optimiser.
        random: As `random_states` returns them; empty where none were saved.
        extra: What the caller added, a JSON object.
    """

    step: int
    model: dict[str, Tensor]
    optimizers: list[dict]
    random: dict[str, Tensor]
    extra: dict


def save_checkpoint(
    folder: str | os.PathLike,
    step: int,
    model: Mapping[str, Tensor],
    optimizers: Sequence[Mapping] = (),
    *,
    random: Mapping[str, Tensor] | None = None,
    extra: Mapping | None = None,
    keep_last: int | None = None,
) -> Path:
    """Write the checkpoint `folder/step-{step:08d}` in one step and return its path.

    Args:
        folder: Where checkpoints are kept; it is created if needed. Only one process may write into it.
        step: Steps done, at least 0.
        model: As `model_state(model)` returns it.
        optimizers: A `state_dict()` of each optimiser.
        random: As `random_states()` returns them.
        extra: Anything that JSON can hold.
        keep_last: Afterwards delete all but this many of the newest checkpoints; None keeps all.

    Raises:
        CheckpointError: It cannot be written (disk full, no permission, a checkpoint of that step exists). What was
            there before is untouched.
        ValueError: `step` or `keep_last` is too small.
    """
    # Refuse what cannot be, and name what will be written.
    if step < 0 or (keep_last is not None and keep_last < 1):
        raise ValueError(f"step is {step}, keep_last {keep_last}; at least 0 and at least 1 are needed")
    folder = Path(folder)
    final = folder / f"step-{step:08d}"
    part = folder / f".{final.name}.part"
    parts = [split_optimizer_state(state) for state in optimizers]
    moments = {
        f"{i}/{name}": tensor for i, (tensors, _) in enumerate(parts) for name, tensor in tensors.items()
    }
    files = {"model.safetensors": model, "optimizer.safetensors": moments, "random.safetensors": random or {}}
    state = {
        "step": step,
        "optimizers": [rest for _, rest in parts],
        "extra": dict(extra or {}),
        "sha256": {},
    }
    try:
        # Everything goes into a folder with another name first.
        if final.exists():
            raise FileExistsError("it exists already")
        folder.mkdir(parents=True, exist_ok=True)
        _remove_litter(folder)
        part.mkdir()
        for name, tensors in files.items():
            # A copy for views, and for tensors that share memory: the format stores each one whole.
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part / name)
            state["sha256"][name] = _sha256(part / name)
        (part / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        # On the disk before it has its name.
        for path in (*part.iterdir(), part):
            _to_disk(path)
        os.rename(part, final)  # the moment in which the checkpoint comes into being
        _to_disk(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(
            f"{final} was not written: {error}; earlier checkpoints are untouched"
        ) from error
    # Only now may an earlier one go.
    for path in checkpoints(folder)[:-keep_last] if keep_last else ():
        _remove(path)
    return final


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Return the paths of the checkpoints in a folder, oldest first; an empty list where the folder is missing."""
    found = Path(folder).glob("step-*")
    named = [path for path in found if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(named, key=lambda path: int(path.name[5:]))


def latest_checkpoint(folder: str | os.PathLike) -> Path | None:
    """Return the path of the newest checkpoint in a folder, or None where there is none."""
    found = checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read the checkpoint at `path`, tensors on the CPU.

    Raises:
        CheckpointError: A file is missing, unreadable or not the one that was written.
    """
    path = Path(path)
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        for name, expected in state["sha256"].items():
            if _sha256(path / name) != expected:
                raise ValueError(f"{name} has another SHA-256 than when it was written")
        model, moments, random = (load_file(path / name) for name in state["sha256"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    optimizers = []
    for i, rest in enumerate(state["optimizers"]):
        own = {name.split("/", 1)[1]: tensor for name, tensor in moments.items() if name.startswith(f"{i}/")}
        optimizers.append(join_optimizer_state(own, rest))
    return Checkpoint(state["step"], model, optimizers, random, state["extra"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """Ask the system to bring a file, or the names in a folder, to the disk; Windows has no way for folders."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Delete a checkpoint so that no half of it keeps its name."""
    doomed = path.with_name(f".{path.name}.old")
    try:
        os.rename(path, doomed)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be deleted: {error}") from error
    shutil.rmtree(doomed, ignore_errors=True)


def _remove_litter(folder: Path) -> None:
    """Delete what killed processes left behind: unfinished checkpoints and half-deleted ones."""
    for path in (*folder.glob(".step-*.part"), *folder.glob(".step-*.old")):
        shutil.rmtree(path, ignore_errors=True)
