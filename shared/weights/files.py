"""Files of weights: safetensors read header by header and a few rows at a time, and checkpoint folders.

`load_safetensors` checks every name and shape before it moves a number. A folder is written so that it
stands under its name only when it is complete.

Left out: pickled checkpoints, which can run code when they are read, quantised weights, and models
written into several files (they are read).

Follows the safetensors format of Hugging Face: a header in JSON, then the numbers.

Explained and proven in ch04_gpt/05_modern_variants.ipynb and ch05_pretraining/06_pretrained_weights.ipynb;
written from there by `make promote`.
"""

import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shared.model.gpt import GPTModel
from shared.model.layers import choose
from shared.weights.names import FAMILIES, huggingface_views

PIECE_NUMBERS = 2_000_000
# What old files hold besides weights: masks and rotary frequencies.
_BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")


def read_header(path: str | os.PathLike) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and type, such as ((4, 2), "F32"), of each tensor in a file; ValueError if it is damaged."""
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
    parameters = model.named_parameters()
    views = huggingface_views(model, family) if family else {name: p.detach() for name, p in parameters}
    if on_meta := [name for name, view in views.items() if view.is_meta]:
        raise ValueError(f"{on_meta[0]} is on the meta device, where nothing can be loaded into it")
    prefix = {None: "", "gpt2": "transformer."}.get(family, "model.")
    sources, shapes = {}, {}
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        for name, (shape, _) in read_header(path).items():
            full = name if name.startswith((prefix, "lm_head.")) else prefix + name
            if full in sources:
                raise ValueError(f"{path} holds {name}, which an earlier file holds too")
            if not _BUFFERS.search(full):
                sources[full], shapes[full] = (path, name), shape
    head, embedding = "lm_head.weight", f"{FAMILIES.get(family, {}).get('token_embedding')}.weight"
    # Some programs store a tied head a second time.
    if head not in views and {head, embedding} <= sources.keys():
        pairs = zip(read_pieces(*sources[head]), read_pieces(*sources[embedding]), strict=False)
        if shapes[head] != shapes[embedding] or not all(torch.equal(a, b) for (_, a), (_, b) in pairs):
            raise ValueError(f"{head} differs from {embedding}: the model needs tie_weights=False")
        del sources[head]
    if wrong := sorted(views.keys() ^ sources.keys()):
        where = "is missing in the file" if wrong[0] in views else "has no place in the model"
        raise ValueError(f"{wrong[0]} {where}; {len(wrong)} names do not match")
    for name, view in views.items():
        if shapes[name] != tuple(view.shape):
            raise ValueError(f"{name} must have shape {tuple(view.shape)}, got {shapes[name]}")
    for name, view in views.items():
        for start, rows in read_pieces(*sources[name]):
            view[start : start + len(rows)].copy_(rows)


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


def save_checkpoint_folder(model: GPTModel, folder: str | os.PathLike[str], **details: object) -> None:
    """Write a folder in our own format, which any configuration has: weights, and config.json with `details` (JSON).

    Raises FileExistsError if the folder holds something.
    """
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_folder(folder, {"config.json": {"model": asdict(model.config), **details}}, tensors)


def write_folder(
    folder: str | os.PathLike[str], files: Mapping[str, object], tensors: Mapping[str, Tensor]
) -> None:
    """Write JSON files and model.safetensors; FileExistsError if the folder holds something."""
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder {folder} exists already and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as hidden:
        part = Path(hidden) / "part"
        part.mkdir()
        for name, content in files.items():
            (part / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
        # A copy of each, as the format stores no views.
        copies = {
            name: tensor.cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        save_file(copies, part / "model.safetensors", metadata={"format": "pt"})
        if folder.exists():
            folder.rmdir()  # Windows gives no folder the name of another, empty or not
        part.rename(folder)
