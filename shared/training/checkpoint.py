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

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shared.checks import check_path
from shared.weights.names import unwrap, unwrapped_name


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and saved buffers by name, each tensor once: a tied output head is left out.

    The names are those of the model itself, however it is wrapped.
    """
    kept, seen = {}, set()
    for name, tensor in unwrap(model).state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[unwrapped_name(name)] = tensor.detach()
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


TUPLE, PAIRS, TENSOR = "tuple", "pairs", "tensor"  # the marks of what JSON does not have


def to_json(value: object, place: str, tensors: dict[str, Tensor]) -> object:
    """Return `value` as JSON that `from_json` turns back; its tensors go into `tensors`, by their places.

    Args:
        value: Numbers, NumPy's too (they come back as Python's), texts, None, tensors, and lists, tuples and dicts of
            these, however deep.
        place: What the value is called, in the names of tensors and in errors.
        tensors: Is filled.

    Raises:
        TypeError: Something else is in it; the message says where.
    """
    # A single value.
    if isinstance(value, Tensor):
        tensors[place] = value
        return {TENSOR: place}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    # Several values, in order.
    if isinstance(value, list | tuple):
        items = [to_json(item, f"{place}[{i}]", tensors) for i, item in enumerate(value)]
        return {TUPLE: items} if isinstance(value, tuple) else items
    # Several values with keys: an object if the keys are texts, and it cannot be taken for a mark.
    if isinstance(value, Mapping):
        items = [to_json(item, f"{place}[{key!r}]", tensors) for key, item in value.items()]
        like_a_mark = len(value) == 1 and {TUPLE, PAIRS, TENSOR} & {*value}
        if all(type(key) is str for key in value) and not like_a_mark:
            return dict(zip(value, items, strict=True))
        keys = [to_json(key, f"a key of {place}", tensors) for key in value]
        return {PAIRS: [list(pair) for pair in zip(keys, items, strict=True)]}
    raise TypeError(
        f"{place} must be numbers, texts, None, tensors, or lists and dicts of them, got {value!r:.80}"
    )


def from_json(value: object, tensors: Mapping[str, Tensor]) -> object:
    """Return what `to_json` was given."""
    if isinstance(value, list):
        return [from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    mark, inside = next(iter(value.items())) if len(value) == 1 else (None, None)
    if mark == TENSOR:
        return tensors[inside]
    if mark == TUPLE:
        return tuple(from_json(item, tensors) for item in inside)
    if mark == PAIRS:
        return {from_json(key, tensors): from_json(item, tensors) for key, item in inside}
    return {key: from_json(item, tensors) for key, item in value.items()}


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
        extra: What the caller added.
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
        extra: Anything that `to_json` takes.
        keep_last: Afterwards delete all but this many of the newest checkpoints; None keeps all.

    Raises:
        CheckpointError: It cannot be written (disk full, no permission, a checkpoint of that step exists). What was
            there before is untouched.
        ValueError: `step` or `keep_last` is too small, or the bytes of the path are not UTF-8.
        TypeError: The state of an optimizer, or `extra`, holds what cannot be written.
    """
    # Refuse what cannot be, and name what will be written, before there is a file.
    check_path("folder", folder)
    if step < 0 or (keep_last is not None and keep_last < 1):
        raise ValueError(f"step is {step}, keep_last {keep_last}; at least 0 and at least 1 are needed")
    folder = Path(folder)
    final = folder / f"step-{step:08d}"
    part = folder / f".{final.name}.part"
    tensors: dict[str, Tensor] = {}
    state = {
        "step": step,
        "optimizers": to_json(list(optimizers), "optimizers", tensors),
        "extra": to_json(dict(extra or {}), "extra", tensors),
        "sha256": {},
    }
    files = {"model.safetensors": model, "optimizer.safetensors": tensors, "random.safetensors": random or {}}
    try:
        # Everything goes into a folder with another name first.
        if final.exists():
            raise FileExistsError("it exists already")
        folder.mkdir(parents=True, exist_ok=True)
        _remove_litter(folder)
        part.mkdir()
        for name, own in files.items():
            # Copies, because of views and of tensors that share memory: the format stores each one whole.
            copies = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in own.items()}
            save_file(copies, part / name)
            state["sha256"][name] = _sha256(part / name)
        (part / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        # On the disk before it has its name.
        for path in (*part.iterdir(), part):
            _to_disk(path)
        os.rename(part, final)  # the moment in which the checkpoint comes into being
        _to_disk(folder)
    except Exception as error:
        # Whatever went wrong, nothing half-written stays.
        shutil.rmtree(part, ignore_errors=True)
        if not isinstance(error, OSError | SafetensorError):
            raise
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
        ValueError: The bytes of the path are not UTF-8.
    """
    check_path("path", path)
    path = Path(path)
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        for name, expected in state["sha256"].items():
            if _sha256(path / name) != expected:
                raise ValueError(f"{name} has another SHA-256 than when it was written")
        model, tensors, random = (load_file(path / name) for name in state["sha256"])
        optimizers, extra = (from_json(state[name], tensors) for name in ("optimizers", "extra"))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return Checkpoint(state["step"], model, optimizers, random, extra)


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
