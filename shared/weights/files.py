"""Files of weights: safetensors read header by header and a few rows at a time, and checkpoint folders.

`load_safetensors` checks every name and shape before it moves a number. `write_folder` gives a folder its
name when it is complete.

Left out: pickled checkpoints, which can run code when they are read, quantised weights, and writing a
model in several files; they are read.

Follows the safetensors format of Hugging Face: a header in JSON, then the numbers.

Explained and proven in ch04_gpt/05_modern_variants.ipynb and ch05_pretraining/06_pretrained_weights.ipynb and
deployment/02_export_and_local.ipynb; written from there by `make promote`.
"""

import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shared.checks import check_path, choose
from shared.model.gpt import GPTConfig, GPTModel
from shared.weights.names import FAMILIES, huggingface_views, unwrap, unwrapped_name

PIECE_NUMBERS = 2_000_000
# What old files hold besides weights: masks and rotary frequencies.
_BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")


def read_header(path: str | os.PathLike) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and type, such as ((4, 2), "F32"), of each tensor in a file; ValueError if it is damaged."""
    check_path("path", path)
    try:
        with safe_open(os.fspath(path), "pt") as file:
            entries = {name: file.get_slice(name) for name in sorted(file.keys())}
            return {name: (tuple(entry.get_shape()), entry.get_dtype()) for name, entry in entries.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def read_pieces(path: str | os.PathLike, name: str) -> Iterator[tuple[int, Tensor]]:
    """Yield whole rows of a tensor in a file, about `PIECE_NUMBERS` at a time, after the number of the first.

    The file is opened anew for each: while it is open, all pages that were read count as the process's own memory.
    """
    start, n_rows = 0, 1
    while start < n_rows:
        with safe_open(os.fspath(path), "pt") as file:
            stored = file.get_slice(name)
            n_rows, *rest = stored.get_shape()
            end = start + max(1, PIECE_NUMBERS // math.prod(rest))
            yield start, stored[start:end]
        start = end


def load_safetensors(
    model: GPTModel, paths: str | os.PathLike | Iterable[str | os.PathLike], family: str | None
) -> None:
    """Copy weights from files into `model`, a few rows at a time, in the model's type and on its device.

    All names and shapes are checked first, so a file that does not fit changes nothing. The names may lack the prefix
    `transformer.` or `model.`, as in files of the model without its head.

    Args:
        model: Its configuration must be that of the file; see `config_from_hf`.
        paths: A safetensors file, or all files of a model that is stored in several.
        family: A name in `FAMILIES`; None for our own names.

    Raises:
        ValueError: A tensor is missing, not known, there twice, of another shape, or a head of its own where the
            model's is tied; a parameter has no counterpart or no memory ("meta"); or a file is damaged.
        FileNotFoundError: A file is missing.
    """
    # Where the numbers go: the parameters under the file's names.
    own = {unwrapped_name(name): parameter.detach() for name, parameter in unwrap(model).named_parameters()}
    views = huggingface_views(model, family) if family else own
    if on_meta := [name for name, view in views.items() if view.is_meta]:
        raise ValueError(f"{on_meta[0]} is on the meta device, where nothing can be loaded into it")
    # Where they come from: each full name in one file, buffers left out.
    prefix = {None: "", "gpt2": "transformer."}.get(family, "model.")
    sources, shapes = {}, {}
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        for name, (shape, _) in read_header(path).items():
            plain = unwrapped_name(name)
            full = plain if plain.startswith((prefix, "lm_head.")) else prefix + plain
            if full in sources:
                raise ValueError(f"{path} holds {name}, which an earlier file holds too")
            if not _BUFFERS.search(full):
                sources[full], shapes[full] = (path, name), shape
    # Some programs store a tied head a second time: it must be the embedding.
    head, embedding = "lm_head.weight", f"{FAMILIES.get(family, {}).get('token_embedding')}.weight"
    if head not in views and {head, embedding} <= sources.keys():
        pairs = zip(read_pieces(*sources[head]), read_pieces(*sources[embedding]), strict=False)
        if shapes[head] != shapes[embedding] or not all(torch.equal(a, b) for (_, a), (_, b) in pairs):
            raise ValueError(f"{head} differs from {embedding}: the model needs tie_weights=False")
        del sources[head]
    # All names and shapes must fit before a number moves.
    if wrong := sorted(views.keys() ^ sources.keys()):
        where = "is missing in the file" if wrong[0] in views else "has no place in the model"
        raise ValueError(f"{wrong[0]} {where}; {len(wrong)} names do not match")
    for name, view in views.items():
        if shapes[name] != tuple(view.shape):
            raise ValueError(f"{name} must have shape {tuple(view.shape)}, got {shapes[name]}")
    # Then the numbers, a few rows at a time.
    for name, view in views.items():
        for start, rows in read_pieces(*sources[name]):
            view[start : start + len(rows)].copy_(rows)


class _NoFirstWeights(TorchFunctionMode):
    """Inside this context the functions of torch.nn.init leave tensors as they are."""

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def empty_model(
    config: GPTConfig, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> GPTModel:
    """Return a model to load weights into: its parameters are not initialised, its computed tables are right."""
    with _NoFirstWeights():
        model = GPTModel(config)
    for parameter in model.parameters():  # the same objects, so a tied output head stays tied
        parameter.data = torch.empty(parameter.shape, device=device, dtype=dtype)
    return model.to(device)  # the tables


_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder; FileNotFoundError if one is missing."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; pickled weights (.bin, .pt) are not read")
    return [folder / name for name in names]


def stored_dtype(paths: Iterable[Path]) -> torch.dtype:
    """Return the type of most numbers in safetensors files; ValueError if it is not float or a file is damaged."""
    counts = Counter()
    for path in paths:
        for shape, kind in read_header(path).values():
            counts[kind] += math.prod(shape)
    return choose("dtype of the stored weights", max(counts, key=counts.get, default="none"), _STORED)


def save_checkpoint_folder(
    model: GPTModel,
    folder: str | os.PathLike[str],
    *,
    state: Mapping[str, Tensor] | None = None,
    replace: bool = False,
    **details: object,
) -> None:
    """Write a folder in our own format, which any configuration has: weights, and config.json with `details` (JSON).

    Args:
        model: The configuration is its own, and without `state` the weights are. It may be wrapped, see `unwrap`.
        folder: Where to write; see `write_folder`.
        state: The parameters by name, for a model of which this process holds only a part.
        replace: Write in the place of an earlier checkpoint; see `write_folder`.
        details: How the weights came about.

    Raises:
        ValueError: `state` has not the names and shapes of the parameters.
        FileExistsError: The folder holds something that may not be replaced.
        OSError: It cannot be written; what was there before is as it was.
    """
    model = unwrap(model)
    parameters = {unwrapped_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    state = parameters if state is None else {unwrapped_name(name): tensor for name, tensor in state.items()}
    if wrong := sorted(state.keys() ^ parameters.keys()):
        raise ValueError(
            f"state must have the names of the model's parameters, got a difference in {wrong[0]}"
        )
    for name, tensor in state.items():
        if tensor.shape != parameters[name].shape:
            expected = tuple(parameters[name].shape)
            raise ValueError(f"state must have {name} of shape {expected}, got {tuple(tensor.shape)}")
    write_folder(folder, {"config.json": {"model": asdict(model.config), **details}}, state, replace=replace)


def write_folder(
    folder: str | os.PathLike[str],
    files: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    *,
    replace: bool = False,
) -> None:
    """Write JSON files and model.safetensors into a folder that gets its name when it is complete and on the disk.

    A process that is killed on the way leaves a hidden folder beside it and nothing else. A replacement takes two
    renames; one killed between them leaves the earlier folder and the new one in there, each complete.

    Args:
        folder: It must not exist, or be empty.
        files: Name -> content.
        tensors: The weights by name.
        replace: The folder may also hold files of the names that are written; they go when the new ones are complete.

    Raises:
        FileExistsError: The folder holds something else.
        OSError: It cannot be written (disk full, no permission); what was there before is as it was.
        ValueError: The bytes of the path are not UTF-8.
    """
    check_path("folder", folder)
    folder = Path(folder).absolute()
    own = {*files, "model.safetensors"} if replace else set()
    # What lies there must be nothing, or what may be replaced.
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= own):
        allowed = f"hold nothing but {', '.join(sorted(own))}" if replace else "be empty"
        raise FileExistsError(f"folder must be new or {allowed}, got {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as hidden:
        part, earlier = Path(hidden, "part"), Path(hidden, "earlier")
        # Everything under a hidden name, and to the disk: a power cut could otherwise leave a name and empty files.
        try:
            _write_files(part, files, tensors)
        except SafetensorError as error:
            raise OSError(f"{folder} cannot be written: {error}") from error
        for path in (*part.iterdir(), part):
            to_disk(path)
        # What has the name gives it up, and gets it back if the rest fails.
        if folder.exists() and replace:
            folder.rename(earlier)
        elif folder.exists():
            folder.rmdir()
        try:
            part.rename(folder)
        except BaseException:
            if earlier.exists():
                earlier.rename(folder)
            raise
        to_disk(folder.parent)


def _write_files(folder: Path, files: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Make a folder and write JSON files and model.safetensors into it."""
    folder.mkdir()
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    # A copy of each tensor, as the format stores no views.
    copies = {
        name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})


def to_disk(path: Path) -> None:
    """Ask the system to bring a file, or the names in a folder, to the disk; Windows has no way for folders."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden path to write to; the file gets its name when the block ends well, complete and on the disk.

    Raises:
        FileExistsError: Something has the name already.
        OSError: It cannot be written (disk full, no permission); nothing is left of it.
        ValueError: The bytes of the path are not UTF-8.
    """
    check_path("path", path)
    path = Path(path).expanduser().absolute()
    if path.exists():
        raise FileExistsError(f"path must be new, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as hidden:
        part = Path(hidden, path.name)
        yield part
        to_disk(part)
        part.rename(path)
        to_disk(path.parent)
