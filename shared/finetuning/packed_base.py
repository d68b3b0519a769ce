"""A frozen model whose weights stay in the blocks of a GGUF file, in memory, and are unpacked one layer at a
time.

`load_packed` builds it; `attach_lora` takes it as any other model. Gradients pass through the packed maps
to the adapters and to what is below.

Left out: packing a model that is not in a file (`write_gguf` writes one), experts, and kernels that
multiply without unpacking.

Follows Dettmers et al. (2023, "QLoRA: Efficient Finetuning of Quantized LLMs") in the idea, not in its
number format.

Explained and proven in appendix_lora/01_lora.ipynb; written from there by `make promote`.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.checks import require
from shared.model.gpt import GPTModel
from shared.weights.files import empty_model
from shared.weights.gguf import GGUFFile, decode_blocks, read_gguf
from shared.weights.gguf_model import GGUF_NAMES, check_vocabulary, checked_targets, config_from_gguf


class _PackedProduct(torch.autograd.Function):
    """x @ W.T, where W is unpacked a few rows at a time, and once more in the backward pass; W gets no gradient."""

    @staticmethod
    def forward(context: Any, x: Tensor, packed: "PackedLinear") -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        context.packed = packed
        return torch.cat([F.linear(x, rows.to(x)) for rows in packed.pieces()], dim=-1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x."""
        total, start = None, 0
        for rows in context.packed.pieces():
            stop = start + len(rows)
            part = gradient[..., start:stop] @ rows.to(gradient)
            total, start = part if total is None else total.add_(part), stop
        return total, None


PIECE = 4096  # rows that are unpacked at a time


class PackedRows(nn.Module):
    """A matrix in the blocks of a GGUF file.

    Args:
        parts: One or several matrices, stacked: (kind, uint8 (rows, bytes of a row)), see `decode_blocks`.
        columns: Numbers in a row.

    Attributes:
        n_packed: How many numbers are packed here; 0 if they are those of another module, which counts them.
    """

    def __init__(self, parts: Sequence[tuple[str, Tensor]], columns: int) -> None:
        super().__init__()
        self.kinds = [kind for kind, _ in parts]
        self.shape = (sum(len(raw) for _, raw in parts), columns)
        self.n_packed = self.shape[0] * columns
        for number, (_, raw) in enumerate(parts):
            self.register_buffer(f"raw_{number}", raw, persistent=False)

    def pieces(self) -> Iterator[Tensor]:
        """Yield the rows as float32, (at most `PIECE`, columns) at a time."""
        for number, kind in enumerate(self.kinds):
            for raw in self.get_buffer(f"raw_{number}").split(PIECE):
                yield self.unpacked(kind, raw)

    def unpacked(self, kind: str, raw: Tensor) -> Tensor:
        """Return packed rows as float32: uint8 (rows, bytes) -> (rows, columns)."""
        numbers = torch.from_numpy(decode_blocks(kind, raw.cpu().numpy().reshape(-1)))
        return numbers.view(len(raw), self.shape[1]).to(raw.device)

    @property
    def weight(self) -> Tensor:
        """The whole matrix as float32: a new tensor each time."""
        return torch.cat(list(self.pieces()))


class PackedLinear(PackedRows):
    """A frozen linear map whose weight is packed; it computes and passes gradients on as `nn.Linear` does."""

    def __init__(self, parts: Sequence[tuple[str, Tensor]], columns: int, bias: Tensor | None = None) -> None:
        super().__init__(parts, columns)
        self.out_features, self.in_features = self.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        y = _PackedProduct.apply(x, self)
        return y if self.bias is None else y + self.bias


class PackedEmbedding(PackedRows):
    """An embedding whose rows are packed; only those that are looked up are unpacked."""

    def forward(self, ids: Tensor) -> Tensor:
        """int64 ids (...) -> float32 (..., columns). Raises IndexError if there is no such row."""
        rows = self.unpacked(self.kinds[0], self.raw_0[ids.flatten()])
        return rows.view(*ids.shape, self.shape[1])


Targets = Mapping[str, list[tuple[Tensor, Tensor | None]]]  # of `checked_targets`


def in_our_order(rows: Tensor, order: Tensor | None) -> Tensor:
    """Return rows as our model has them: row i of the file is our row `order[i]`; None: they stand as they are."""
    if order is None:
        return rows
    moved = torch.empty_like(rows)
    moved[order] = rows
    return moved


def packed_part(file: GGUFFile, name: str, targets: Targets) -> tuple[str, Tensor]:
    """Return the kind of a tensor and its packed rows, uint8 (rows, bytes), in our order."""
    stored = file.tensors[name]
    raw = np.fromfile(file.path, np.uint8, stored.n_bytes, offset=stored.start)
    rows = torch.from_numpy(raw).view(stored.shape[0], -1)
    return stored.kind, in_our_order(rows, targets[name][0][1])


def load_packed(path: str | os.PathLike[str]) -> GPTModel:
    """Return the model of a GGUF file whose linear maps and embeddings stay packed, in evaluation mode and frozen.

    It computes what `load_gguf` of the same file computes, with a fraction of the memory and in more time.

    Raises:
        ValueError: As `load_gguf`; or the model has experts, which are not packed here.
        FileNotFoundError: There is no such file.
    """
    file = read_gguf(path)
    config, names = config_from_gguf(file), GGUF_NAMES[str(file.metadata["general.architecture"])]
    check_vocabulary(file, config)
    require("path", os.fspath(path), config.feed_forward != "moe", "a model without experts")
    model = empty_model(config)  # memory that is never written to is never taken
    targets = checked_targets(file, model)
    for place, module in list(model.named_modules()):
        theirs = names.get(re.sub(r"\.\d+\b", ".{}", place))
        if theirs is None or (place == "output_head" and config.tie_weights):
            continue
        # The tensors of the file that are this module, stacked.
        several = (theirs,) if isinstance(theirs, str) else theirs
        stored = [name.format(*re.findall(r"\d+", place)) for name in several]
        if not isinstance(module, nn.Linear | nn.Embedding):  # a norm
            for kind, parameter in module.named_parameters(recurse=False):
                parameter.data.copy_(file.read(f"{stored[0]}.{kind}"))
            continue
        parts = [packed_part(file, f"{one}.weight", targets) for one in stored]
        columns = module.weight.shape[1]
        if isinstance(module, nn.Embedding):
            model.set_submodule(place, PackedEmbedding(parts, columns))
        else:
            of_bias = [f"{one}.bias" for one in stored] if module.bias is not None else []
            biases = [in_our_order(file.read(name), targets[name][0][1]) for name in of_bias]
            bias = torch.cat(biases) if biases else None
            model.set_submodule(place, PackedLinear(parts, columns, bias))
    if config.tie_weights:  # the same rows, which the embedding counts
        embedding = model.token_embedding
        model.output_head = PackedLinear([(embedding.kinds[0], embedding.raw_0)], config.emb_dim)
        model.output_head.n_packed = 0
    return model.requires_grad_(False).eval()
