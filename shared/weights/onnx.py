"""Models as ONNX graphs: tokens, mask, positions and cache come in, logits and the grown cache go out.

`CacheOutside` is the model without memory, `trace_decoder` its graph for `torch.export`, `export_to_onnx`
the file. `shared.serving.onnx_runtime` runs it without torch.

Left out: packed numbers, files above 2 GB, and graphs that choose the next token themselves.

Follows the names of inputs and outputs in the files of Hugging Face's Optimum.

Explained and proven in deployment/02_export_and_local.ipynb; written from there by `make promote`.
"""

import copy
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from shared.generation.engine import evaluating
from shared.model.gpt import GPTModel
from shared.weights.files import new_file
from shared.weights.names import unwrap


class GrownCache:
    """Keys and values of one layer as plain tensors that grow by `append`, with what attention asks of a cache.

    Args:
        keys, values: Of the tokens so far, (batch, n_kv_heads, past, head_dim).
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        return self.keys.shape[2]

    def contents(self) -> tuple[Tensor, Tensor]:
        """Return keys and values."""
        return self.keys, self.values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put new ones behind the old ones and return all."""
        self.keys = torch.cat((self.keys, keys), dim=2)
        self.values = torch.cat((self.values, values), dim=2)
        return self.keys, self.values


class CacheOutside(nn.Module):
    """A GPT without memory of its own: what it remembers comes in as tensors, and goes out as tensors."""

    def __init__(self, model: GPTModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the logits (batch, tokens, vocab_size), and keys and values of all tokens, a pair for each layer.

        Args:
            input_ids: int64 (batch, tokens), the new ones.
            attention_mask: int64 (batch, past + tokens), 1 for real tokens and 0 for padding.
            position_ids: int64 (batch, tokens).
            past: For each layer keys and values (batch, n_kv_heads, past, head_dim).
        """
        caches = [GrownCache(keys, values) for keys, values in past]
        logits = self.model(
            input_ids, positions=position_ids, key_padding_mask=attention_mask.bool(), caches=caches
        )
        return logits, [cache.contents() for cache in caches]


def example_inputs(model: GPTModel, batch: int, tokens: int, past: int) -> tuple:
    """Return inputs of `CacheOutside` with these sizes; the values are zeros and ones."""
    config = model.config
    shape = (batch, config.n_kv_heads or config.n_heads, past, config.actual_head_dim)
    return (
        torch.zeros(batch, tokens, dtype=torch.int64),
        torch.ones(batch, past + tokens, dtype=torch.int64),
        torch.arange(past, past + tokens).repeat(batch, 1),
        [(torch.zeros(shape), torch.zeros(shape)) for _ in model.blocks],
    )


def trace_decoder(model: GPTModel) -> ExportedProgram:
    """Return the graph of `CacheOutside`, with the sizes of batch, new tokens and past left open.

    The model must be in evaluation mode, its numbers float32. Raises ValueError if they are not.
    """
    if model.training or any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise ValueError("model must be in evaluation mode and float32: call model.float().eval()")
    # The example has at least two of everything: torch.export takes a size of 1 for a constant.
    inputs = example_inputs(model, batch=2, tokens=3, past=4)
    batch, tokens, past = Dim("batch"), Dim("tokens"), Dim("past")
    layer = ({0: batch, 2: past}, {0: batch, 2: past})
    shapes = (
        {0: batch, 1: tokens},
        {0: batch, 1: Dim.DYNAMIC},
        {0: batch, 1: tokens},
        [layer] * len(model.blocks),
    )
    with torch.no_grad():
        return torch.export.export(CacheOutside(model), inputs, dynamic_shapes=shapes)


def graph_names(n_layers: int) -> tuple[list[str], list[str]]:
    """Return the names of the inputs and of the outputs, as the files of Hugging Face's Optimum have them."""
    pairs = [f"{i}.{part}" for i in range(n_layers) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{pair}" for pair in pairs)]
    return inputs, ["logits", *(f"present.{pair}" for pair in pairs)]


OPSET = 18  # a version of ONNX's list of operations that runtimes of the last years know
LARGEST_FILE = 1_900_000_000  # bytes of weights; the format ends at 2 GB


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporter's remarks, such as those about packages that it does not need, from the screen."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def export_to_onnx(model: GPTModel, path: str | os.PathLike[str], **details: str) -> None:
    """Write a model as ONNX: tokens, mask, positions and cache go in, logits and the grown cache come out.

    Batch, number of new tokens and length of the past are open, 0 included for the past. Numbers are float32.

    Args:
        model: Any `GPTModel`; it may be wrapped, see `unwrap`, and is not changed.
        path: The file must not exist; it appears when it is complete. Above 2 GB the format needs another file beside
            it, which is refused.
        details: Texts that are stored with the graph, such as the tokenizer; the configuration is stored as "config".

    Raises:
        ValueError: The model is too large for one file.
        FileExistsError: The file exists.
        OSError: It cannot be written; nothing is left of it.
    """
    model = unwrap(model)
    if 4 * model.n_parameters > LARGEST_FILE:
        raise ValueError(f"model must have at most {LARGEST_FILE // 4:,} numbers, got {model.n_parameters:,}")
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        model = copy.deepcopy(model).float()
    inputs, outputs = graph_names(len(model.blocks))
    with new_file(path) as part:
        # What PyTorch does, operation by operation; then the same in the words of ONNX.
        with evaluating(model), quiet_exporter():
            traced = trace_decoder(model)
            program = torch.onnx.export(
                traced, input_names=inputs, output_names=outputs, opset_version=OPSET, verbose=False
            )
        # Open sizes get names that a reader understands.
        graph = program.model.graph
        (batch, tokens), (_, total) = graph.inputs[0].shape, graph.inputs[1].shape
        past = graph.inputs[3].shape[2]
        program.rename_axes({batch: "batch", tokens: "tokens", past: "past", total: "past + tokens"})
        stored = {"config": json.dumps(asdict(model.config)), **details}
        program.model.metadata_props.update(stored)
        program.save(part, external_data=False)
