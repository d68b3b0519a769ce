"""What a frozen language model computes of texts, computed once: hidden states, pooled features, and a cache
on the disk.

Rows of ids are padded on the right and pooled by their mask, so a text has the same features alone and in
any batch. A model can be cut into a lower and an upper part that share its weights. A file of the cache
is named after everything that its numbers depend on; it appears whole or not at all.

Left out: several processes that share one cache at a time without losing each other's rows, features of
more than one layer at once, and models other than `GPTModel`.

Follows the feature-based use of language models in Devlin et al. (2019, "BERT: Pre-training of Deep
Bidirectional Transformers for Language Understanding").

Explained and proven in ch06_classification/01_spam.ipynb; written from there by `make promote`.
"""

import copy
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shared.checks import check_choice, check_path, require, whole_number
from shared.data.download import cache_dir
from shared.generation.engine import evaluating
from shared.model.gpt import GPTModel
from shared.weights.files import to_disk

POOLINGS = ("last", "first", "mean")


def pad_inputs(rows: Sequence[Sequence[int] | Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows of different lengths as one batch, padded on the right, and which of its places are real.

    Args:
        rows: At least one; each holds at least one id, or is a tensor of hidden states (tokens, emb_dim).

    Returns:
        inputs: int64 ids (rows, longest), or states (rows, longest, emb_dim); the padding is zeros.
        mask: Bool (rows, longest), True for what is real.

    Raises:
        ValueError: There is no row, or one is empty.
    """
    require("rows", len(rows), len(rows) > 0, "at least one")
    tensors = [torch.as_tensor(row) for row in rows]
    lengths = torch.tensor([len(row) for row in tensors])
    require("rows", int(lengths.min()), bool(lengths.min() > 0), "rows of at least one token")
    inputs = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    return inputs, torch.arange(inputs.shape[1]) < lengths[:, None]


def pool_states(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Return one vector for each row: (batch, tokens, emb_dim) -> (batch, emb_dim).

    Args:
        states: Hidden states; those of padding are never read.
        mask: Bool (batch, tokens), True for real tokens, at least one in each row. Padding may stand on either side.
        pooling: "last" or "first" real token, or the "mean" over all real ones.

    Raises:
        ValueError: A shape does not fit, a row has no real token, or the pooling is unknown.
    """
    check_choice("pooling", pooling, POOLINGS)
    if states.dim() != 3 or mask.shape != states.shape[:2]:
        raise ValueError(f"mask must be {tuple(states.shape[:2])} as the states, got {tuple(mask.shape)}")
    if not bool(mask.any(dim=1).all()):
        raise ValueError("mask must have a real token in each row, got a row without one")
    if pooling == "mean":
        # What stands in the padding may be anything, even NaN: it is left out, not multiplied by zero.
        return states.masked_fill(~mask[..., None], 0).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    places = torch.arange(mask.shape[1], device=mask.device)
    chosen = torch.where(mask, places, -1).argmax(1) if pooling == "last" else mask.int().argmax(1)
    return states[torch.arange(len(states), device=states.device), chosen]


def batches_by_length(rows: Sequence[Sequence[int] | Tensor], batch_size: int) -> Iterator[list[int]]:
    """Yield the places of rows of similar length, `batch_size` together, so that little is padding."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _with_blocks(model: GPTModel, blocks: nn.ModuleList) -> GPTModel:
    """A copy of the model's table of parts, not of the parts: all weights are shared."""
    part = copy.copy(model)
    part._modules = {**model._modules, "blocks": blocks}
    part.config = replace(model.config, n_layers=len(blocks))
    return part


def lower_part(model: GPTModel, n_blocks: int) -> GPTModel:
    """Return a model of the first `n_blocks` blocks that shares its weights with `model`; it has no final norm.

    Raises ValueError if `n_blocks` is not between 1 and the number of blocks.
    """
    n_layers = len(model.blocks)
    n_blocks = whole_number("n_blocks", n_blocks)
    require("n_blocks", n_blocks, n_blocks <= n_layers, f"at most {n_layers}, the model's blocks")
    part = _with_blocks(model, model.blocks[:n_blocks])
    part.final_norm = nn.Identity()
    return part


def upper_part(model: GPTModel, n_lower: int) -> GPTModel:
    """Return a model of the blocks above the first `n_lower`, and the final norm; it shares its weights with `model`.

    It is given the states that leave block `n_lower` instead of tokens: `upper.hidden_states(states)`. So what is
    frozen below can be computed once, and what is above be trained.

    Raises ValueError if `n_lower` is not between 1 and the number of blocks less 1.
    """
    n_layers = len(model.blocks)
    n_lower = whole_number("n_lower", n_lower)
    require("n_lower", n_lower, n_lower < n_layers, f"below {n_layers}, the model's blocks")
    part = _with_blocks(model, model.blocks[n_lower:])
    part.position_embedding, part.dropout = None, nn.Identity()  # both did their work below
    return part


@torch.no_grad()
def token_states(
    model: GPTModel, rows: Sequence[Sequence[int]], n_blocks: int, batch_size: int = 16
) -> Iterator[tuple[int, Tensor]]:
    """Yield the place of each row, and what leaves block `n_blocks` (counted from 1) for its tokens, (tokens, emb_dim).

    Rows of similar length come together, padded on the right: under a causal mask no real token sees padding, so a row
    has the same states alone. They come as float32 on the CPU. Raises ValueError if a row is empty or longer than the
    context, or `n_blocks` out of range.
    """
    lower = lower_part(model, n_blocks)
    device = next(model.parameters()).device
    with evaluating(model):
        for places in batches_by_length(rows, batch_size):
            tokens, mask = pad_inputs([rows[i] for i in places])
            states = lower.hidden_states(tokens.to(device)).float().cpu()
            for i, row_states, row_mask in zip(places, states, mask, strict=True):
                yield i, row_states[row_mask]


def pooled_features(
    model: GPTModel,
    rows: Sequence[Sequence[int]],
    n_blocks: int,
    pooling: str = "mean",
    batch_size: int = 16,
) -> Tensor:
    """Return one vector for each row of ids, (rows, emb_dim), pooled from what leaves block `n_blocks`.

    See `token_states` and `pool_states`; both say what is refused.
    """
    check_choice("pooling", pooling, POOLINGS)
    features = torch.empty(len(rows), model.config.emb_dim)
    for i, states in token_states(model, rows, n_blocks, batch_size):
        mask = torch.ones(1, len(states), dtype=torch.bool)
        features[i] = pool_states(states[None], mask, pooling)[0]
    return features


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of all parameters of a model, with their names, shapes and types: equal for equal models."""
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        raw = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        found.update(raw.numpy())
    return found.hexdigest()


def features_of(model: GPTModel, n_blocks: int, pooling: str) -> dict[str, str]:
    """Return what features depend on besides the ids: the blocks they went through, how many, and the pooling."""
    return {
        "weights": weights_hash(lower_part(model, n_blocks)),
        "n_blocks": str(n_blocks),
        "pooling": pooling,
    }


def computed_by() -> dict[str, str]:
    """Return what else may change a feature: the code of model and pooling, torch, and the order of sums."""
    code = hashlib.sha256()
    room = Path(sys.modules[GPTModel.__module__].__file__).parent
    for path in (*sorted(room.glob("*.py")), room.parent / "finetuning" / "features.py"):
        code.update(path.read_bytes())
    return {
        "code": code.hexdigest(),
        "torch": torch.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "OTHER_PROCESSOR": os.environ.get("OTHER_PROCESSOR", ""),
    }


def row_key(row: Sequence[int]) -> bytes:
    """Return 16 bytes that stand for a row of ids: its text, as the tokenizer cut it."""
    return hashlib.sha256(np.asarray(row, dtype=np.int64).tobytes()).digest()[:16]


def save_features(
    path: str | os.PathLike[str], features: Mapping[bytes, Tensor], about: Mapping[str, str]
) -> None:
    """Write features by the keys of their rows, and what they are about; the file appears whole or not at all.

    Raises:
        OSError: It cannot be written; what was there before is as it was.
    """
    check_path("path", path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = torch.tensor([list(key) for key in features], dtype=torch.uint8)
    tensors = {"keys": keys, "features": torch.stack(list(features.values()))}
    # Under a name of its own until it is complete.
    handle, part = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, part, metadata=dict(about))
        to_disk(Path(part))
        os.replace(part, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        Path(part).unlink(missing_ok=True)


def load_features(path: str | os.PathLike[str], about: Mapping[str, str]) -> dict[bytes, Tensor]:
    """Return the features of a file, float32 (emb_dim,), by the keys of their rows.

    Raises:
        ValueError: The file is damaged, or is about something else than `about`, such as another model's weights.
        FileNotFoundError: There is no such file.
    """
    check_path("path", path)
    try:
        with safe_open(os.fspath(path), "pt") as file:
            stored = file.metadata() or {}
            for name, value in about.items():
                if stored.get(name) != value:
                    raise ValueError(
                        f"{path} must hold features with {name} {value!r:.40}, got {stored.get(name)!r:.40}"
                    )
            keys, features = file.get_tensor("keys"), file.get_tensor("features").float()
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or holds no features: {error}") from error
    return {bytes(key): vector for key, vector in zip(keys.tolist(), features, strict=True)}


def cached_features(
    model: GPTModel,
    rows: Sequence[Sequence[int]],
    n_blocks: int,
    pooling: str = "mean",
    *,
    folder: str | os.PathLike[str] | None = None,
    batch_size: int = 16,
) -> Tensor:
    """Return `pooled_features`, computing only those that no earlier call left in the cache.

    A file of the cache belongs to one model, layer, pooling, code and processor; in it each row of ids has its vector.
    Two processes that write at once cost each other work, never a wrong number.

    Args:
        folder: Where the cache lies; "features" in `cache_dir()` if not given. It may be deleted at any time.
    """
    check_choice("pooling", pooling, POOLINGS)
    about = features_of(model, n_blocks, pooling) | computed_by()
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    path = (cache_dir() / "features" if folder is None else Path(folder)) / f"{name}.safetensors"
    # What is known; a damaged file is as good as none.
    try:
        known = load_features(path, about)
    except (FileNotFoundError, ValueError):
        known = {}
    # What is missing, each row once.
    keys = [row_key(row) for row in rows]
    missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
    if missing:
        new = pooled_features(model, list(missing.values()), n_blocks, pooling, batch_size)
        known |= zip(missing, new, strict=True)
        save_features(path, known, about)
    return torch.stack([known[key] for key in keys])
